"""The search for widths per layer under a budget in bytes.

Reading order: `space` (what may be chosen, and its bytes), `sensitivity` (what a choice costs by itself), `additive` (the
optimum of that), `surrogate` and `hypervolume` (what trials teach, and what a new one could bring), `proposal` (the next
one), `objective` (what a trial is), `ledger` (the study on disk, shared by workers), `mark` (which study it is), `standing`
(where it stands), `searching` (all of it together), `workers`, `results` and `figures`.
"""

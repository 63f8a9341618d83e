"""What is measured, a folder for each subject; every script says in its own docstring how it is run and what it writes.

    speed      a training step, dequantizing, generation, products, and small decisions
    memory     plans against what is measured, and LLaMA-2-7B
    quality    perplexity and accuracy of every method
    search     searched widths, against the truth and after fine-tuning
    scale      two processes, and a plan for eight GPUs
    pruning    what is left after pruning
    serving    formats, and the engines that read them
    results    what they all found

`python benchmarks/report.py` writes the pages of docs/ from results/.

A script that imports another puts the folder above this one on the path first, so that it runs as it is typed, and imports
by the full name: `from benchmarks.speed.step import environment`. Imports go in no circle (`tests/test_benchmarks.py`).
"""

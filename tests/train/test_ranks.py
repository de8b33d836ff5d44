"""What a rank sets up before it trains or evaluates."""

from __future__ import annotations

import pytest
import torch

from longclip.train import ranks


def test_fp32_is_fp32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch lets cuDNN, which computes the images' patches, use TF32 unless it is told not to."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert ranks._device(0) == torch.device("cuda", 0)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32

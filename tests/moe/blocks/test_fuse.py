"""Functions that are compiled on a GPU: on a CPU they are what is written."""

import pytest
import torch

from moe.blocks.fuse import fused_on_gpu


def test_a_cpu_runs_the_function_itself(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda _: pytest.fail("compiled on a CPU"))
    calls = []

    @fused_on_gpu
    def double(x, factor):
        """Say what it does."""
        calls.append(factor)
        return 2 * x

    assert torch.equal(double(torch.ones(3), 5), torch.full((3,), 2.0))
    assert calls == [5]
    assert double.__doc__ == "Say what it does."


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_embedding_and_loss_on_a_gpu_equal_those_of_a_cpu(dtype):
    from moe.blocks.rope import rotate, rotation
    from moe.train.loss import language_model_loss

    draw = torch.Generator().manual_seed(0)
    x_BHSd = torch.randn(2, 4, 10, 16, generator=draw).to(dtype)
    cos, sin = rotation(torch.arange(10), head_dim=16, theta=1e4)
    assert torch.allclose(rotate(x_BHSd.cuda(), cos.cuda(), sin.cuda()).cpu(), rotate(x_BHSd, cos, sin), atol=1e-2)
    logits = torch.randn(2, 10, 300, generator=draw).to(dtype)
    label, valid = torch.randint(300, (2, 10), generator=draw), torch.arange(10) < torch.tensor([[10], [3]])
    losses = []
    for device in ("cpu", "cuda"):
        leaf = logits.to(device).requires_grad_()
        loss = language_model_loss(leaf, label.to(device), valid.to(device))
        losses.append((loss.item(), torch.autograd.grad(loss, leaf)[0].float().cpu()))
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)
    assert torch.allclose(losses[1][1], losses[0][1], atol=1e-2)

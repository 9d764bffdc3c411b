"""How far what the quantized model says is from full precision, and the gradient of that."""

from __future__ import annotations

import torch

from qig_serve.offline.source.loaded_model import LoadedModel


def divergence(
    loaded: LoadedModel, wanted: torch.Tensor, found: torch.Tensor, back: bool = True
) -> tuple[float, torch.Tensor]:
    """Sum over tokens of KL(full precision || quantized) in nats, and its gradient [n, C].

    The gradient is zero unless it is asked for with `back`.

    wanted, found: hidden states [n, C] behind the last block, of full precision and of the
    quantized model, on the model's device. Both go through the model's own norm and output head,
    in full precision, in pieces, so that a vocabulary of any size fits.
    """
    rows = loaded.rows_at_once
    total, gradients = 0.0, []
    for p, q in zip(wanted.split(rows), found.split(rows), strict=True):
        with torch.no_grad():
            log_p = loaded.logits(p).float().log_softmax(-1)
        with torch.set_grad_enabled(back):
            q = q.detach().requires_grad_(back)
            log_q = loaded.logits(q).float().log_softmax(-1)
            kl = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
        gradients.append(torch.autograd.grad(kl, q)[0] if back else torch.zeros_like(q))
        total += float(kl.detach())
    return total, torch.cat(gradients) if gradients else torch.zeros_like(found)

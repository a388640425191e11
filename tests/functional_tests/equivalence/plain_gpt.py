"""A GPT in plain torch and float64, written from the papers' formulas and sharing no code with the library.

It says whether the reference that all layouts are compared with is right itself. s sequence, b batch, h hidden,
a heads, g query groups, d head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.functional_tests.equivalence.covering import Row

HEADS, HIDDEN, LENGTH = 8, 32, 32
WIDTH = HIDDEN // HEADS
EPS = 1e-5
LR, MIN_LR, WEIGHT_DECAY, CLIP = 1e-2, 1e-3, 0.1, 1.0
BETAS, ADAM_EPS, MOMENTUM = (0.9, 0.999), 1e-2, 0.9


@dataclass
class PlainGPT:
    """The model of a row of the design, with weights by their names in the whole model."""

    row: Row
    weights: dict[str, Tensor]
    num_layers: int
    vocab_size: int

    def __post_init__(self) -> None:
        self.is_llama = self.row["block"] == "llama"
        self.groups = HEADS if self.row["query groups"] == "all" else int(self.row["query groups"])

    def token_losses(self, tokens: Tensor, positions: Tensor, labels: Tensor, ends: Tensor) -> Tensor:
        """[b, s] cross entropy of each token; `ends` marks the tokens after which a document ends."""
        x = self.weights["embedding.word_embeddings.weight"][tokens]  # [b, s, h]
        if not self.is_llama:
            x = x + self.weights["embedding.position_embeddings.weight"][positions]
        visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(len(tokens), -1, -1)
        document = ends.cumsum(1) - ends.long()
        if self.row["documents"] == "isolated":
            visible = visible & (document[:, :, None] == document[:, None, :])
        for layer in range(self.num_layers):
            x = x + self.attention(self.norm(x, f"decoder.layers.{layer}.input_layernorm"), layer, visible, positions)
            x = x + self.mlp(self.norm(x, f"decoder.layers.{layer}.pre_mlp_layernorm"), layer)
        x = self.norm(x, "decoder.final_layernorm")
        output = "embedding.word_embeddings" if self.row["output"] == "tied" else "output_layer"
        logits = x @ self.weights[f"{output}.weight"].T
        return -logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)

    def norm(self, x: Tensor, name: str) -> Tensor:
        """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467) over the last dimension."""
        weight = self.weights[f"{name}.weight"]
        if self.is_llama:
            return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + self.weights[f"{name}.bias"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        """x Wᵀ + b, without b where the model has none."""
        y = x @ self.weights[f"{name}.weight"].T
        return y if self.is_llama else y + self.weights[f"{name}.bias"]

    def attention(self, x: Tensor, layer: int, visible: Tensor, positions: Tensor) -> Tensor:
        """Grouped-query attention (arXiv:2305.13245): the rows of W are, group by group, queries, key, value."""
        name = f"decoder.layers.{layer}.self_attention"
        each = HEADS // self.groups
        mixed = self.linear(x, f"{name}.linear_qkv").unflatten(-1, (self.groups, each + 2, WIDTH))
        q = mixed[..., :each, :].flatten(2, 3)  # [b, s, a, d]
        k, v = mixed[..., each, :], mixed[..., each + 1, :]  # [b, s, g, d]
        if self.is_llama:
            q, k = self.norm(q, f"{name}.q_layernorm"), self.norm(k, f"{name}.k_layernorm")
            q, k = rotate(q, positions), rotate(k, positions)
        k, v = k.repeat_interleave(each, 2), v.repeat_interleave(each, 2)
        scores = torch.einsum("bqad,bkad->baqk", q, k) / math.sqrt(WIDTH)
        probabilities = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        context = torch.einsum("baqk,bkad->bqad", probabilities, v).flatten(2)
        return self.linear(context, f"{name}.linear_proj")

    def mlp(self, x: Tensor, layer: int) -> Tensor:
        """GELU (tanh form, arXiv:1606.08415), or SwiGLU (arXiv:2002.05202) with the gate's rows first."""
        y = self.linear(x, f"decoder.layers.{layer}.mlp.linear_fc1")
        if self.is_llama:
            gate, up = y.chunk(2, -1)
            y = gate * torch.sigmoid(gate) * up
        else:
            y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        return self.linear(y, f"decoder.layers.{layer}.mlp.linear_fc2")


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864) on the halves of each head; x [b, s, a, d]."""
    frequencies = (10000.0 ** (-torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)).float().double()
    angles = positions[..., None, None] * frequencies  # the model's frequencies are float32 numbers
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@dataclass
class PlainTraining:
    """Steps of AdamW (arXiv:1711.05101) or momentum SGD with clipping and a cosine schedule, all written out."""

    row: Row
    model: PlainGPT
    decay_samples: int
    consumed: int = 0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    first_gradients: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, list[Tensor]] = field(default_factory=dict)

    def step(self, batch: list[dict[str, Any]], eod: int) -> None:
        """One update from these samples, each a micro-batch of its own."""
        weights = {name: w.detach().requires_grad_() for name, w in self.model.weights.items()}
        self.model.weights = weights
        sums, counts = [], []
        for sample in batch:
            tokens, labels, mask, positions = (
                sample[k][None] for k in ("tokens", "labels", "loss_mask", "position_ids")
            )
            losses = self.model.token_losses(tokens, positions, labels, tokens == eod)
            sums.append((losses * mask).sum())
            counts.append(mask.sum())
        per_token = torch.stack(sums).sum() / torch.stack(counts).sum()
        mean_of_means = torch.stack([s / c.clamp(min=1) for s, c in zip(sums, counts)]).mean()
        objective = per_token if self.row["loss"] == "per token" else mean_of_means
        gradients = dict(zip(weights, torch.autograd.grad(objective, list(weights.values()))))
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        self.losses.append(float(per_token.detach()))  # what is logged is a mean over tokens in either case
        self.grad_norms.append(float(norm))
        self.first_gradients = self.first_gradients or gradients
        clip = min(1.0, CLIP / (float(norm) + 1e-6))
        done = self.consumed / self.decay_samples
        lr = MIN_LR + (LR - MIN_LR) * 0.5 * (1 + math.cos(math.pi * done))
        for name, gradient in gradients.items():
            self.update(name, gradient * clip, lr)
        self.consumed += len(batch)

    @torch.no_grad()
    def update(self, name: str, gradient: Tensor, lr: float) -> None:
        """New values of one weight; biases and norms do not decay."""
        weight = self.model.weights[name]
        decay = WEIGHT_DECAY if weight.dim() > 1 else 0.0
        number = len(self.losses)
        if self.row["optimizer"] == "sgd":
            gradient = gradient + decay * weight
            velocity = MOMENTUM * self.state[name][0] + gradient if name in self.state else gradient
            self.state[name] = [velocity]
            self.model.weights[name] = weight - lr * velocity
            return
        m, v = self.state.get(name, [torch.zeros_like(weight), torch.zeros_like(weight)])
        m, v = BETAS[0] * m + (1 - BETAS[0]) * gradient, BETAS[1] * v + (1 - BETAS[1]) * gradient.square()
        self.state[name] = [m, v]
        m_hat, v_hat = m / (1 - BETAS[0] ** number), v / (1 - BETAS[1] ** number)
        self.model.weights[name] = weight * (1 - lr * decay) - lr * m_hat / (v_hat.sqrt() + ADAM_EPS)

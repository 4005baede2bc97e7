"""A small GPT over bytes: an ordinary LightningModule, nothing of nemologger in it."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256  # every byte is a token


class Block(nn.Module):
    """One transformer layer: causal self-attention, then a feed-forward network, each behind a layer norm.

    Args:
        width: Size of a token's vector.
        heads: Number of attention heads; divides ``width``.
        dropout: Share of activations that are dropped in training.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, time, width)`` to the same shape."""
        batch, time, width = x.shape
        q, k, v = (
            part.view(batch, time, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        attended = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        x = x + self.project(attended.transpose(1, 2).reshape(batch, time, width))
        return x + self.feed(self.feed_norm(x))


class ByteGPT(pl.LightningModule):
    """Predicts the next byte of a text.

    Args:
        width: Size of a token's vector.
        layers: Number of transformer layers.
        heads: Attention heads per layer.
        context: Longest text it looks at, in bytes.
        dropout: Share of activations that are dropped in training.
        learning_rate: AdamW's, after the warm-up.
        warmup_steps: Steps over which the learning rate rises to its value.
    """

    def __init__(
        self,
        width: int = 128,
        layers: int = 5,
        heads: int = 4,
        context: int = 128,
        dropout: float = 0.05,
        learning_rate: float = 2e-3,
        warmup_steps: int = 20,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.context = context
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.embed = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``(batch, time)`` to the logits of each one's successor, ``(batch, time, 256)``."""
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))

    def _loss(self, window: Tensor) -> Tensor:
        """Mean cross entropy in nats per byte, over windows ``(batch, context + 1)``."""
        logits = self(window[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of one batch of windows."""
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the loss on files that training never saw."""
        self.log("val_loss", self._loss(batch), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW with a linear warm-up."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=self.warmup_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self) -> None:
        """Log what the model writes by itself."""
        for logger in self.loggers:
            add_text = getattr(logger.experiment, "add_text", None)
            if add_text is not None:
                add_text("sample", f"```\n{self.sample()}\n```", self.global_step)

    @torch.no_grad()
    def sample(self, prompt: str = "def ", length: int = 200, temperature: float = 0.8, seed: int = 0) -> str:
        """Let the model write ``length`` bytes after ``prompt``; the same each time."""
        was_training = self.training
        self.eval()
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.tensor([list(prompt.encode())], device=self.device)
        for _ in range(length):
            logits = self(tokens[:, -self.context :])[:, -1].cpu() / temperature
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, drawn.to(self.device)], dim=1)
        self.train(was_training)
        return bytes(tokens[0].tolist()).decode(errors="replace")

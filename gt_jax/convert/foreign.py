"""Models that are related to ours or famous, told by their tensors or their config.json."""

import re
from collections.abc import Mapping
from typing import Any

from gt_jax.convert.settings import shown
from gt_jax.convert.tensor import Tensor
from gt_jax.errors import InputError

# Names of tensors that give another model away, and that model. The first match counts.
TENSORS = (
    (r"\.(att|attn|attention)\.(r_k|x_r|k_k|k_a|x_w)$", "RWKV-7"),
    (r"\.(att|attn|attention)\.time_first$", "RWKV-4"),
    (r"\.(att|attn|attention)\.time_mix_\w", "RWKV-5"),
    (r"\.mixer\.(x_proj|dt_proj)\.", "Mamba-1"),
    (r"\.mixer\.(B_bias|C_bias|mimo_\w+)$", "Mamba-3"),
    (r"\.self_attn\.q_proj\.|\.attn\.c_attn\.|\.attention\.query_key_value\.", "a transformer"),
)
MODEL_TYPES = {
    "rwkv": "RWKV-4",
    "rwkv4": "RWKV-4",
    "rwkv5": "RWKV-5",
    "rwkv7": "RWKV-7",
    "mamba": "Mamba-1",
    "falcon_mamba": "Falcon Mamba, a Mamba-1",
    "mamba3": "Mamba-3",
    "log_linear_mamba2": "log-linear Mamba-2",
    "bamba": "Bamba, Mamba-2 with attention layers",
    "zamba2": "Zamba2, Mamba-2 with attention layers",
    "nemotron_h": "Nemotron-H, Mamba-2 with attention layers",
    "falcon_h1": "Falcon-H1, Mamba-2 with attention layers",
    "granitemoehybrid": "Granite 4, Mamba-2 with attention layers",
}
OURS = ("rwkv6", "mamba2", "mamba_ssm", "gt_jax")


def refuse(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Raise InputError that names the model, if these are tensors or settings of one not ours."""
    for pattern, model in TENSORS:
        found = next(filter(re.compile(pattern).search, tensors), None)
        if found is not None:
            raise InputError(f"this is {model}, as its {found} tells; RWKV-6 or Mamba-2 is needed")
    model_type = config.get("model_type")
    if model_type is None or model_type in OURS:
        return
    name = MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
    is_named = f" ({name})" if name else ""
    raise InputError(
        f"config.json: model_type={shown(model_type)}{is_named} is neither RWKV-6 nor Mamba-2"
    )

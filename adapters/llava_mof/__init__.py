"""LLaVA-1.5 that reads CLIP and DINOv2 tokens mixed before its projector (Additive-MoF).

Additive mixture of features, a baseline of the paper (Table 13; Tong et al. 2024): every image
token is `clip_share` times CLIP's plus the rest times DINOv2's token of the same place. `build`
makes such a directory of a LLaVA-1.5 and a DINOv2; it has to be tuned before its answers mean
anything.
"""

from __future__ import annotations

from kuea_mllm.adapters.base import AdapterManifest

MANIFEST = AdapterManifest(
    name="llava_mof",
    summary="LLaVA-1.5 with CLIP and DINOv2 tokens added before the projector (Additive-MoF)",
    factory="kuea_mllm.adapters.llava_mof.adapter:LlavaMofAdapter",
)

"""Model types of transformers that see images and that vitlib refuses, by the reason.

Types that many know stand in hf_types.py, each with its own reason.
"""

from __future__ import annotations

_BY_REASON: dict[str, tuple[str, ...]] = {
    "its attention is within windows": (
        "deepseek_ocr2", "deepseek_ocr2_sam_vision_model", "got_ocr2_vision", "lw_detr",
        "lw_detr_vit", "maskformer-swin", "pp_formulanet", "pp_formulanet_vision", "rf_detr",
        "rf_detr_dinov2", "sam3_lite_text", "sam3_tracker", "sam3_tracker_video", "sam3_video",
        "sam3_vision_model", "sam3_vit_model", "sam_hq_vision_model", "slanext", "slanext_vision",
        "swin2sr", "unlimited_ocr", "unlimited_ocr_sam_vision_model", "vitmatte",
    ),
    "a hierarchy of windows": (
        "dinat", "edgetam", "edgetam_video", "edgetam_vision_model", "florence2", "florence_vision",
        "sam2_hiera_det_model", "sam2_video", "sam2_vision_model",
    ),
    "its backbone has windows or convolutions": (
        "conditional_detr", "d_fine", "dab-detr", "deformable_detr", "deimv2", "detr",
        "grounding-dino", "mask2former", "maskformer", "mm-grounding-dino", "omdet-turbo",
        "oneformer", "pp_doclayout_v2", "pp_doclayout_v3", "rt_detr", "rt_detr_v2",
        "table-transformer", "tvp",
    ),
    "a convolutional network": (
        "align_vision_model", "efficientloftr", "focalnet", "hgnet_v2", "mobilenet_v1",
        "mobilenet_v2", "poolformer", "pp_lcnet", "pp_lcnet_v3", "pp_lcnet_v4", "regnet",
        "rt_detr_resnet", "superglue", "superpoint", "textnet", "uvdoc", "uvdoc_backbone",
    ),
    "convolutions and attention": ("cvt", "mobilevitv2", "swiftformer"),
    "a pyramid": ("glpn",),
    "its patches are packed, with positions of two or three axes": (
        "cohere_compass", "cohere_compass_vision", "colqwen2", "cosmos3_omni", "dots3_note",
        "dots3_note_vision_encoder", "ernie4_5_vl_moe", "ernie4_5_vl_moe_vision", "exaone4_5",
        "exaone4_5_vision", "glm46v", "glm4v", "glm4v_moe", "glm4v_moe_vision", "glm4v_vision",
        "glm5_next", "glm5_next_vision", "glm_image", "glm_image_vision", "glm_ocr",
        "glm_ocr_vision", "hyperclovax_vision_v2", "inkling2", "inkling2_vision", "kimi_k25",
        "kimi_k25_vision", "lighton_ocr", "llama4_vision_model", "minimax_m3_vl",
        "minimax_m3_vl_vision", "mistral_large4", "muse_glimmer", "muse_glimmer_vision",
        "muse_spark", "muse_spark_vision", "paddleocr_vl", "paddleocr_vl_vision", "qwen2_5_omni",
        "qwen2_5_omni_thinker", "qwen2_5_omni_vision_encoder", "qwen2_5_vl_vision",
        "qwen2_vl_vision", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_vision", "qwen3_5_vision",
        "qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_vision_encoder", "qwen3_vl_moe",
        "qwen3_vl_moe_vision", "qwen3_vl_vision", "qwen4_exp", "qwen4_exp_vision", "video_llama_3",
        "video_llama_3_vision",
    ),
    "its patches are packed, and merged": (
        "cosmos3_edge", "cosmos3_edge_vision", "hunyuan_vl", "hunyuan_vl_vision", "minicpm_ocr",
        "minicpm_ocr_vision", "minicpmv4_6", "minicpmv4_6_vision", "minicpmv4_7",
        "minicpmv4_7_vision",
    ),
    "convolutions in its blocks": ("lfm3_vl", "lfm3_vl_vision"),
    "convolutions after its blocks merge patches": ("step3p7", "step3p5_vision"),
    "norms before and after each branch": (
        "diffusion_gemma", "embedding_gemma2", "gemma4", "gemma4_vision",
    ),
    "no vision transformer: patches go to the language model": (
        "chameleon", "emu3", "fuyu", "gemma4_unified", "gemma4_unified_vision", "inkling_mm_model",
        "inkling_vision",
    ),
    "texts and patches in one encoder": ("layoutlmv3", "neomme", "udop"),
    "its patches come as rows with their place on the page": (
        "kosmos-2.5", "kosmos_2_5_vision_model", "pix2struct", "pix2struct_vision_model",
    ),
    "its patches are of videos": (
        "pe_video", "pe_video_encoder", "videoprism", "videoprism_vision_model", "xclip",
        "xclip_vision_model",
    ),
    "its tower is timm's, in a wrapper of transformers": (
        "fast_vlm", "gemma3n", "gemma3n_vision", "perception_lm",
    ),
    "two ViTs, of images and of videos": ("video_llava",),
    "three ViTs, which read an image at three scales": ("depth_pro",),
    "queries that join in its last blocks": ("videomt",),
    "pairs of images in one encoder": ("seggpt",),
    "a cross-attention of learned tokens": ("perceiver",),
    "transformers attends causally or not, as its kernel does": (
        "phi4_multimodal", "phi4_multimodal_vision",
    ),
    "a norm before and after each block, and two towers that meet": ("bridgetower_vision_model",),
    "tokens that are grouped between its blocks": ("groupvit_vision_model",),
    "its tiles have gated positions": ("mllama_vision_model",),
    "an encoder of a language model reads what windows give": (
        "deepseek_ocr2_encoder", "deepseek_ocr2_vision", "unlimited_ocr_vision",
        "unlimited_ocr_vision_encoder",
    ),
}  # fmt: skip
REFUSED: dict[str, str] = {name: why for why, names in _BY_REASON.items() for name in names}

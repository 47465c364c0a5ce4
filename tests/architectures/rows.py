"""Every MoE block of transformers 5.23, in each setting that decides what it computes, and our fields that make it.

The sizes are those of `tests.architectures.pairs`: hidden size D, N experts of width F, K of them a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.architectures import pairs
from tests.architectures.pairs import F, K, PairsOf

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A public block: architecture and setting, where transformers has it, our fields, what its configuration says."""

    name: str
    setting: str
    block: str
    """ "Class" in its modeling file."""
    fields: Fields
    config: Fields = field(default_factory=dict)
    pairs: PairsOf = pairs.usual
    run: str = ""
    """How it is called, where otherwise than with hidden states alone."""
    training: bool = False
    skipped: str = ""
    """What of it is not computed, and why."""

    @property
    def id(self) -> str:
        return f"{self.name} ({self.setting})" if self.setting else self.name


# Softmax and top-k; sigmoid with a bias that selects, in groups and without.
SMOE: Fields = {"preset": "smoe"}
RAW: Fields = {"preset": "olmoe"}
SIGMOID: Fields = {"preset": "aux_free", "routed_scaling": 1.5}
V3: Fields = {**SIGMOID, "n_group": 4, "topk_group": 2, "group_score": "top2_sum", "shared_experts": 1}
GROUPS: Fields = {"n_group": 4, "topk_group": 2}
V2: Fields = {"preset": "deepseek_moe", "variant": "v2", "routed_scaling": 1.5, "shared_experts": 2}
GATED: Fields = {**SMOE, "shared_experts": 2, "shared_gate": True}
TWO: Fields = {"shared_expert_intermediate_size": 2 * F, "n_shared_experts": 2, "num_shared_experts": 2}
CAPACITY: Fields = {
    "preset": "smoe",
    "top_k": 1,
    "renormalise": False,
    "expert": "relu_mlp",
    "overflow": "capacity",
    "overflow_parameters": {"tokens": 3},
}
GSHARD: Fields = {
    "preset": "smoe",
    "top_k": 2,
    "expert": "relu_mlp_bias",
    "overflow": "capacity",
    "overflow_parameters": {"factor": 2.0, "group": "batch"},
    "renormalise_kept": True,
}
GEMMA: Fields = {
    "preset": "smoe",
    "gate": "normed",
    "expert": "geglu_tanh",
    "expert_scale": True,
    "shared_experts": 1,
    "shared_width": 2 * F,
    "routed_input": "rms_norm",
    "routed_output": "rms_norm",
    "shared_input": "rms_norm",
    "shared_output": "rms_norm",
    "block_output": "rms_norm",
}
DEEP_V4: Fields = {
    **SIGMOID,
    "score": "sqrt_softplus",
    "expert": "swiglu_clamped",
    "expert_parameters": {"limit": 0.5},
    "shared_experts": 1,
}
NLLB_FAULT = (
    "the block of transformers takes the mask of first choices for expert ids, so that experts 0 and 1 compute alone; "
    "compared is its own router with each expert at its tokens"
)


def v3(name: str, block: str, **config: Any) -> Row:
    return Row(name, "", block, V3, {**GROUPS, **config})


ROWS = (
    Row("afmoe", "", "AfmoeSparseMoeBlock", {**SIGMOID, "shared_experts": 2}, {**TWO, "route_scale": 1.5}),
    Row("aria", "", "AriaTextMoELayer", {**SMOE, "shared_experts": 2}, {"moe_num_shared_experts": 2}, pairs.transposed),
    Row("axk1", "", "AXK1MoE", {**V3, "block_output": "rms_norm"}, GROUPS, pairs.axk1),
    Row("axk2", "no groups", "AXK2MoE", {**SIGMOID, "shared_experts": 1}, {"n_group": None}),
    Row("axk2", "groups", "AXK2MoE", {**V3, "group_mask": "zero"}, GROUPS),
    v3("bailing_hybrid", "BailingHybridMoE"),
    Row("beam", "", "BeamMoE", {**V3, "shared_experts": 0}, GROUPS),
    Row(
        "cohere2_moe", "softmax, sum", "Cohere2MoeSparseMoeBlock", {**SMOE, "shared_experts": 2},
        {**TWO, "shared_expert_combination_strategy": "sum", "expert_selection_fn": "softmax"},
    ),
    Row(
        "cohere2_moe", "sigmoid, sum", "Cohere2MoeSparseMoeBlock", {**SMOE, "score": "sigmoid", "shared_experts": 2},
        {**TWO, "shared_expert_combination_strategy": "sum", "expert_selection_fn": "sigmoid"},
    ),
    Row(
        "cohere2_moe", "average", "Cohere2MoeSparseMoeBlock", {**SMOE, "shared_experts": 2, "combine": "average"},
        {**TWO, "shared_expert_combination_strategy": "average", "expert_selection_fn": "softmax"},
    ),
    Row("dbrx", "p = 1", "DbrxFFN", SMOE, {"moe_normalize_expert_weights": 1}, pairs.dbrx),
    Row("dbrx", "p = 2", "DbrxFFN", {**SMOE, "weight_norm": 2.0}, {"moe_normalize_expert_weights": 2}, pairs.dbrx),
    Row(
        "dbrx", "jitter, training", "DbrxFFN", {**SMOE, "input_jitter": 0.2},
        {"moe_normalize_expert_weights": 1, "moe_jitter_eps": 0.2}, pairs.dbrx, training=True,
    ),
    Row("deepseek_ocr2", "", "DeepseekOcr2TextMoe", V2, {**TWO, "topk_method": "greedy"}),
    Row("deepseek_v2", "greedy", "DeepseekV2Moe", V2, {**TWO, "topk_method": "greedy"}),
    Row(
        "deepseek_v2", "groups", "DeepseekV2Moe", {**V2, **GROUPS},
        {**TWO, **GROUPS, "topk_method": "group_limited_greedy"},
    ),
    v3("deepseek_v3", "DeepseekV3MoE"),
    v3("deepseek_v32", "DeepseekV32MoE"),
    Row(
        "deepseek_v4", "sigmoid, no clamp", "DeepseekV4SparseMoeBlock", {**SIGMOID, "shared_experts": 1},
        {"scoring_func": "sigmoid", "swiglu_limit": 1e9, "mlp_layer_types": ["moe"]}, run="layer",
    ),
    Row(
        "deepseek_v4", "as published", "DeepseekV4SparseMoeBlock", DEEP_V4,
        {"scoring_func": "sqrtsoftplus", "swiglu_limit": 0.5, "mlp_layer_types": ["moe"]}, run="layer",
    ),
    Row(
        "deepseek_v4", "as published, first layers", "DeepseekV4SparseMoeBlock", {**DEEP_V4, "hash_layers": 1},
        {"scoring_func": "sqrtsoftplus", "swiglu_limit": 0.5, "mlp_layer_types": ["hash_moe"]}, pairs.hashed, "tokens",
    ),
    Row(
        "diffusion_gemma", "", "DiffusionGemmaEncoderTextLayer", GEMMA, {"intermediate_size": 2 * F}, pairs.gemma,
        "gemma",
    ),
    Row(
        "doge", "", "DogeCDMoE",
        {
            **SMOE, "gate": "product_keys_mixed", "num_experts": 16, "expert": "silu_mlp", "expert_width": 1,
            "shared_experts": 1, "shared_width": F, "shared_expert": "swiglu",
        },
        {"num_experts": 16, "norm_topk_prob": False}, pairs.doge,
    ),
    v3("dots1", "Dots1MoE"),
    v3("dots3_note", "Dots3NoteTextMoE", shared_experts_intermediate_size=F),
    Row(
        "ernie4_5_moe", "", "Ernie4_5_MoeSparseMoeBlock", {**SMOE, "balance_bias": True, "shared_experts": 2},
        {"moe_num_shared_experts": 2, "moe_norm_min": 1e-12},
    ),
    Row(
        "ernie4_5_vl_moe", "text", "Ernie4_5_VLMoeSparseMoeBlock", {**SMOE, "balance_bias": True},
        {"moe_norm_min": 1e-12}, run="width",
    ),
    v3("exaone_moe", "ExaoneMoeSparseMoEBlock", num_shared_experts=1),
    Row("flex_olmo", "", "FlexOlmoSparseMoeBlock", RAW, {"norm_topk_prob": False}),
    Row("flint", "", "FlintSparseMoeBlock", {**SMOE, "score": "sigmoid", "shared_experts": 2}, TWO),
    Row(
        "gemma4", "", "Gemma4TextDecoderLayer", GEMMA, {"intermediate_size": 2 * F}, pairs.gemma, "gemma",
    ),
    v3("glm4_moe", "Glm4MoeMoE"),
    v3("glm4_moe_lite", "Glm4MoeLiteMoE"),
    v3("glm4v_moe", "Glm4vMoeTextMoE"),
    Row(
        "glm5_next", "", "Glm5NextTextMoE",
        {**V3, "expert": "swiglu_clamped", "expert_parameters": {"limit": 0.5}}, {**GROUPS, "swiglu_limit": 0.5},
    ),
    v3("glm_moe_dsa", "GlmMoeDsaMoE"),
    Row(
        "gpt_oss", "", "GptOssMLP",
        {
            **SMOE, "gate": "affine", "expert": "swiglu_shifted_bias",
            "expert_parameters": {"limit": 0.7, "alpha": 1.702},
        },
        {"swiglu_alpha": 1.702, "swiglu_limit": 0.7}, pairs.gpt_oss,
    ),
    Row("granitemoe", "", "GraniteMoeMoE", SMOE),
    Row("granitemoe_swa", "", "GraniteMoeSWAMoE", SMOE),
    Row("granitemoehybrid", "", "GraniteMoeHybridMoE", SMOE),
    Row("granitemoeshared", "", "GraniteMoeSharedMoE", SMOE),
    Row("hunyuan_v1_moe", "", "HunYuanMoEV1Moe", {**SMOE, "shared_experts": 1}, run="layer"),
    Row(
        "hy_v3", "", "HYV3MoE", {**SIGMOID, "shared_experts": 2},
        {**TWO, "router_scaling_factor": 1.5, "enable_moe_fp32_combine": False},
    ),
    Row(
        "hy_v4", "", "HYV4MoE",
        {**V3, "expert": "swiglu_clamped", "expert_parameters": {"limit": 0.5}, "shared_expert": "swiglu"},
        {**GROUPS, "swiglu_limit": 0.5},
    ),
    Row("inkling", "", "InklingMoE", {"preset": "inkling", "routed_scaling": 1.5}, TWO, pairs.inkling),
    Row(
        "inkling2", "", "Inkling2SparseMoeBlock",
        {**SIGMOID, "expert": "swiglu_softcapped", "expert_parameters": {"gate_cap": 0.7, "up_cap": 0.9}},
        {"scoring_func": "sigmoid", "mlp_gate_softcap": 0.7, "mlp_up_softcap": 0.9},
    ),
    Row("jamba", "", "JambaSparseMoeBlock", RAW),
    Row("jetmoe", "", "JetMoeMoE", {**SMOE, "block_output": "bias"}, pairs=pairs.jetmoe),
    v3("kimi_linear", "KimiLinearMoE"),
    Row(
        "kolibri1", "", "Kolibri1SparseMoeBlock",
        {"preset": "aux_free", "select_by": "logits", "shared_experts": 2}, TWO,
    ),
    Row(
        "laguna", "no cap", "LagunaSparseMoeBlock", {**SIGMOID, "shared_experts": 2},
        {**TWO, "moe_router_logit_softcapping": 0.0},
    ),
    Row(
        "laguna", "cap", "LagunaSparseMoeBlock",
        {**SIGMOID, "gate": "affine", "gate_parameters": {"bias": False, "cap": 0.6}, "shared_experts": 2},
        {**TWO, "moe_router_logit_softcapping": 0.6}, pairs.affine,
    ),
    Row("lfm2_moe", "", "Lfm2MoeSparseMoeBlock", SIGMOID, {"use_expert_bias": True}),
    Row(
        "llama4", "", "Llama4TextMoe",
        {**RAW, "score": "sigmoid", "weights_on": "input", "shared_experts": 1}, pairs=pairs.transposed,
    ),
    Row(
        "longcat_flash", "", "LongcatFlashMoE",
        {
            "preset": "moepp", "copy_experts": 2, "zero_experts": 0, "constant_experts": 0, "gating_residual": False,
            "balance_bias": True, "routed_scaling": 1.5,
        },
        {"zero_expert_num": 2, "expert_ffn_hidden_size": F}, pairs.longcat,
    ),
    Row("mellum", "", "MellumSparseMoeBlock", SMOE),
    Row("mimo_v2_flash", "", "MiMoV2FlashMoE", {**V3, "shared_experts": 0}, GROUPS),
    Row("minimax", "", "MiniMaxSparseMoeBlock", SMOE, {"router_jitter_noise": 0.0}),
    Row(
        "minimax_m2", "", "MiniMaxM2SparseMoeBlock", {"preset": "aux_free"}, {"router_jitter_noise": 0.0},
    ),
    Row(
        "minimax_m3_vl", "", "MiniMaxM3VLSparseMoeBlock",
        {
            **SIGMOID, "expert": "swiglu_shifted", "expert_parameters": {"limit": 0.8, "alpha": 1.3},
            "shared_experts": 1,
        },
        {"swiglu_alpha": 1.3, "swiglu_limit": 0.8, "shared_intermediate_size": F},
    ),
    Row(
        "mistral4", "", "Mistral4MoE",
        {**SMOE, **GROUPS, "group_score": "top2_sum", "routed_scaling": 1.5, "shared_experts": 1}, GROUPS,
    ),
    Row(
        "mistral_large4", "", "MistralLarge4TextMoE",
        {**SMOE, **GROUPS, "group_score": "top2_sum", "routed_scaling": 1.5, "shared_experts": 1}, GROUPS,
    ),
    Row("mixtral", "", "MixtralSparseMoeBlock", SMOE, {"router_jitter_noise": 0.0}),
    Row(
        "mixtral", "jitter, training", "MixtralSparseMoeBlock", {**SMOE, "input_jitter": 0.2},
        {"router_jitter_noise": 0.2}, training=True,
    ),
    Row(
        "muse_spark", "", "MuseSparkMoE",
        {
            **SIGMOID, "temperature": 4.0, "latent_size": 16, "latent_input": "rms_norm",
            "expert_output": "scaled_rms_norm", "frame_eps": 1e-5,
        },
        {"output_multiplier": 0.25, "moe_hidden_size": 16, "rms_norm_eps": 1e-5, "post_norm_eps": 1e-5},
        pairs.muse_spark,
    ),
    Row(
        "nemotron_h", "no latent", "NemotronHMoE", {**V3, "expert": "relu2_mlp", "shared_experts": 2},
        {**GROUPS, "moe_latent_size": None}, pairs.nemotron,
    ),
    Row(
        "nemotron_h", "latent", "NemotronHMoE", {**V3, "expert": "relu2_mlp", "shared_experts": 2, "latent_size": 16},
        {**GROUPS, "moe_latent_size": 16}, pairs.nemotron,
    ),
    Row("nllb_moe", "", "NllbMoeSparseMLP", GSHARD, pairs=pairs.nllb, run="nllb", training=True, skipped=NLLB_FAULT),
    Row(
        "nllb_moe", "evaluation", "NllbMoeSparseMLP",
        {**GSHARD, "overflow_parameters": {"eval_fraction": 0.15, "group": "batch"}},
        {"moe_eval_capacity_token_fraction": 0.15}, pairs.nllb, "nllb", skipped=NLLB_FAULT,
    ),
    Row(
        "nllb_moe", "by score, normalised before", "NllbMoeSparseMLP",
        {
            **GSHARD, "renormalise_kept": False,
            "overflow_parameters": {"tokens": 6, "group": "batch", "order": "score"},
        },
        {"expert_capacity": 6, "batch_prioritized_routing": True, "normalize_router_prob_before_dropping": True},
        pairs.nllb, "nllb", training=True, skipped=NLLB_FAULT,
    ),
    Row("olmoe", "", "OlmoeSparseMoeBlock", RAW, {"norm_topk_prob": False}),
    Row(
        "openai_privacy_filter", "", "OpenAIPrivacyFilterMLP",
        {
            **SMOE, "gate": "affine", "expert": "swiglu_shifted_bias",
            "expert_parameters": {"limit": 0.7, "alpha": 1.702},
        },
        {"swiglu_alpha": 1.702, "swiglu_limit": 0.7}, pairs.privacy_filter,
    ),
    Row(
        "phimoe", "", "PhimoeSparseMoeBlock", {"preset": "sparsemixer", "parameters": {"jitter": 0.3}, "top_k": 2},
        {"router_jitter_noise": 0.3, "input_jitter_noise": 0.0, "num_experts_per_tok": 2},
    ),
    Row(
        "phimoe", "training", "PhimoeSparseMoeBlock",
        {"preset": "sparsemixer", "parameters": {"jitter": 0.3}, "top_k": 2},
        {"router_jitter_noise": 0.3, "input_jitter_noise": 0.0, "num_experts_per_tok": 2}, run="drawn", training=True,
    ),
    Row("qwen2_moe", "", "Qwen2MoeSparseMoeBlock", GATED, TWO),
    Row("qwen3_5_moe", "", "Qwen3_5MoeSparseMoeBlock", GATED, TWO),
    Row("qwen3_moe", "", "Qwen3MoeSparseMoeBlock", SMOE),
    Row("qwen3_next", "", "Qwen3NextSparseMoeBlock", GATED, TWO),
    Row("qwen3_omni_moe", "thinker", "Qwen3OmniMoeThinkerTextSparseMoeBlock", SMOE),
    Row("qwen3_omni_moe", "talker", "Qwen3OmniMoeTalkerTextSparseMoeBlock", GATED, TWO),
    Row("qwen3_vl_moe", "", "Qwen3VLMoeTextSparseMoeBlock", SMOE),
    Row("qwen4_exp", "", "Qwen4ExpTextSparseMoeBlock", GATED, TWO),
    v3("solar_open", "SolarOpenMoE"),
    Row(
        "step3p7", "", "Step3p7SparseMoeBlock", {**SIGMOID, "shared_experts": 1},
        {"moe_router_scaling_factor": 1.5, "swiglu_limits": None, "swiglu_limits_shared": None, "share_expert_dim": F},
        run="layer",
    ),
    Row(
        "step3p7", "clamped experts", "Step3p7SparseMoeBlock",
        {
            **SIGMOID, "expert": "swiglu_clamped", "expert_parameters": {"limit": 0.5, "after": True},
            "shared_experts": 1, "shared_expert": "swiglu",
        },
        {"moe_router_scaling_factor": 1.5, "swiglu_limits": [0.5], "swiglu_limits_shared": None, "share_expert_dim": F},
        run="layer",
    ),
    Row(
        "switch_transformers", "no capacity", "SwitchTransformersSparseMLP",
        {**RAW, "top_k": 1, "expert": "relu_mlp"}, {"expert_capacity": 10**6}, pairs.switch,
    ),
    Row(
        "switch_transformers", "capacity", "SwitchTransformersSparseMLP", CAPACITY, {"expert_capacity": 3},
        pairs.switch,
    ),
    Row(
        "switch_transformers", "jitter, training", "SwitchTransformersSparseMLP", {**CAPACITY, "input_jitter": 0.2},
        {"expert_capacity": 3, "router_jitter_noise": 0.2}, pairs.switch, training=True,
    ),
    Row("unlimited_ocr", "", "UnlimitedOcrTextMoe", V2, {**TWO, "topk_method": "greedy"}),
    Row(
        "zaya", "first layer", "ZayaSparseMoeBlock", {"preset": "zaya", "top_k": 1, "parameters": {"router_size": 16}},
        {"num_experts_per_tok": 1, "router_hidden_size": 16, "rms_norm_eps": 1e-5}, pairs.zaya, "zaya",
    ),
    Row(
        "zaya", "", "ZayaSparseMoeBlock", {"preset": "zaya", "top_k": 1, "parameters": {"router_size": 16}},
        {"num_experts_per_tok": 1, "router_hidden_size": 16, "rms_norm_eps": 1e-5}, pairs.zaya, "zaya next",
    ),
)  # fmt: skip
ARCHITECTURES = tuple(dict.fromkeys(row.name for row in ROWS))
assert K == 3

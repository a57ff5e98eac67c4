"""GPT-2. Only its config.json is read; models of this architecture are written as OPT (opt.py)."""

from __future__ import annotations

from mptq.model.architectures.config_type import LEARNED_POSITIONS, ConfigType

CONFIG_TYPES = {
    "gpt2": ConfigType(
        fields="n_layer n_embd n_inner n_head n_positions vocab_size activation_function layer_norm_epsilon "
        "tie_word_embeddings",
        settings={**LEARNED_POSITIONS, "share_embeddings_and_output_weights": True},
        fixed={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
        ignored="n_ctx reorder_and_upcast_attn summary_type summary_use_proj summary_activation summary_proj_to_labels "
        "summary_first_dropout",
    )
}

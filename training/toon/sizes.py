"""Sizes of the toon networks, as config files in the released form."""

from __future__ import annotations

from ..nets import Sizes

IMAGE_SIZE = 128  # pixels; 16 x 16 latents
TOKEN_DIM = 64
SPEECH_LAYERS, SPEECH_DIM = 3, 96
AUDIO_TOKENS = 4
FACE_EMBEDDING = 512

_LEVELS = {
    "block_out_channels": [48, 64, 96],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": TOKEN_DIM,
    "norm_num_groups": 16,
    "norm_eps": 1e-5,
    "in_channels": 4,
    "out_channels": 4,
    "act_fn": "silu",
    "sample_size": IMAGE_SIZE // 8,
}
# The finest level goes without attention and memory: on two cores they cost three quarters of a step there, and the
# features one level down still hold more numbers than the latents.
REFERENCE_NET = {
    "_class_name": "UNet2DConditionModel",
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    **_LEVELS,
}
DIFFUSION_NET = {
    "_class_name": "UNet3DConditionModel",
    "down_block_types": ["DownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D"],
    "up_block_types": ["CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "UpBlock3D"],
    "audio_attention_dim": TOKEN_DIM,
    "emo_drop_rate": 0.3,
    "motion_module_kwargs": {
        "attention_block_types": ["Temporal_Self"],
        "num_attention_heads": 4,
        "num_transformer_block": 1,
        "temporal_attention_dim_div": 1,
        "temporal_position_encoding": False,
        "temporal_position_encoding_max_len": 32,
        "zero_initialize": True,
    },
    "motion_module_resolutions": [2, 4],
    "use_inflated_groupnorm": True,
    **_LEVELS,
}
NETS = Sizes(
    reference_net=REFERENCE_NET,
    diffusion_net=DIFFUSION_NET,
    face_embedding=FACE_EMBEDDING,
    audio_tokens=AUDIO_TOKENS,
    audio_hidden=256,
    speech_layers=SPEECH_LAYERS,
    speech_dim=SPEECH_DIM,
)
VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [16, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "act_fn": "silu",
    "sample_size": IMAGE_SIZE,
    "scaling_factor": 0.18215,
}
SPEECH = {
    "hidden_size": SPEECH_DIM,
    "num_hidden_layers": SPEECH_LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "conv_dim": [48] * 7,
    "num_conv_pos_embeddings": 32,
    "num_conv_pos_embedding_groups": 8,
    "feat_extract_norm": "group",
}
EMOTION = {
    "model_conf": {
        "depth": 1,
        "num_heads": 4,
        "embed_dim": 64,
        "mlp_ratio": 2.0,
        "encoder_dropout": 0.0,
        "post_mlp_drop": 0.0,
        "attention_dropout": 0.0,
        "modalities": {
            "audio": {
                "prenet_depth": 1,
                "prenet_dropout": 0.0,
                "num_extra_tokens": 2,
                "num_alibi_heads": 4,
                "feature_encoder_spec": "[(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32, 2, 2)] * 2",
                "conv_pos_width": 25,
                "conv_pos_groups": 4,
            }
        },
    }
}

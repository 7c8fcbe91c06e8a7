"""Shapes of attention in real models, as a check that kernels are fast beyond the anchor workloads.

Comments name the model, its layer, and where its numbers are published. For models with full attention, or with windows
that are shifted instead of centred, the row is their layer with a neighborhood window in place of its own attention.
"""

from __future__ import annotations

import torch

from .workloads import Workload

__all__ = ["CENSUS", "HEAVY", "IMAGES", "TEXTS"]

FP16, FP32 = torch.float16, torch.float32

IMAGES = (64, 64), (96, 128), (128, 96), (256, 64), (128, 120), (144, 112), (160, 128), (224, 152)
"""131072 tokens, as many as in eight images of 128x128"""
TEXTS = (12000,), (500,), (6000,), (1268,), (3000,), (8000,), (2000,)
"""32768 tokens"""

CENSUS = {
    w.name: w
    for w in (
        # Text, causal. Gemma 3 4B's and 1B's local layers: google/gemma-3-4b-it and -1b-it, config.json.
        Workload("gemma3", 1, (32768,), 8, 4, 256, (1024,), causal=True),
        Workload("gemma3-1b", 4, (8192,), 4, 1, 256, (512,), causal=True),
        # Gemma 2 9B's local layers: google/gemma-2-9b, config.json (its cap on scores left out).
        Workload("gemma2", 1, (8192,), 16, 8, 256, (4096,), causal=True),
        # Phi-3-mini-4k: microsoft/Phi-3-mini-4k-instruct, config.json: 3072 / 32 heads, sliding_window 2047.
        Workload("phi3", 2, (8192,), 32, 32, 96, (2047,), causal=True),
        # Phi-4-mini-flash: differential attention in 512 tokens, pairs of 64-wide heads over values twice as wide
        # (microsoft/Phi-4-mini-flash-reasoning, config.json and modeling file).
        Workload("phi4-flash", 1, (16384,), 20, 10, 64, (512,), causal=True, value_dim=128),
        # DIFF Transformer's heads of 128 with values of 256, arXiv 2410.05258; in a window of 1024 here.
        Workload("diff-3b", 1, (8192,), 24, 24, 128, (1024,), causal=True, value_dim=256),
        # MiMo-V2-Flash's local layers: XiaomiMiMo/MiMo-V2-Flash, config.json: 192 with values of 128, sinks.
        Workload("mimo", 1, (16384,), 64, 8, 192, (128,), causal=True, value_dim=128, learned_sink=True),
        # StarCoder2 3B: bigcode/starcoder2-3b, config.json: 24 heads over 2, sliding_window 4096.
        Workload("starcoder2", 1, (16384,), 24, 2, 128, (4096,), causal=True),
        # Multi-query with 16 heads over one, head dim 128, in fp16 batches: SantaCoder's heads
        # (bigcode/santacoder, config.json), with a window of 256.
        Workload("multi-query", 16, (2048,), 16, 1, 128, (256,), causal=True, dtype=FP16),
        # Three keys: the shortest window that is more than a shift, as in hybrids that mix locally.
        Workload("window-3", 8, (16384,), 8, 8, 64, (3,), causal=True),
        # Hymba's local layers: nvidia/Hymba-1.5B-Base, config.json: 25 heads over 5, 128 meta tokens before the text.
        Workload("hymba", 2, (8192,), 25, 5, 64, (1024,), causal=True, registers=128),
        # Text, not causal. ModernBERT-base's local layers: answerdotai/ModernBERT-base, local_attention 128 (+ itself).
        Workload("modernbert", 16, (8192,), 12, 12, 64, (129,)),
        # Longformer-large: allenai/longformer-large-4096, attention_window 512, in fp16; its variant with dilation 2.
        Workload("longformer", 8, (4096,), 16, 16, 64, (513,), dtype=FP16),
        Workload("longformer-d2", 8, (4096,), 16, 16, 64, (257,), dilation=2, dtype=FP16),
        # AlphaFold 3's atom transformer (its supplement): 32 queries share 128 keys, 4 heads of 32, five samples.
        Workload("af3-atoms", 5, (32768,), 4, 4, 32, (128,), stride=32),
        # Images. DiNAT-Base, arXiv 2209.15001: heads of 32, 7x7, dilations up to 56 / 7 in stage 1; 14x14 in stage 3.
        Workload("dinat-s1", 64, (56, 56), 4, 4, 32, (7, 7), dilation=8),
        Workload("dinat-s3", 64, (14, 14), 16, 16, 32, (7, 7), dilation=2),
        # NAT-Tiny's stage 1, 2 heads of 32, in ADE20K's pictures of 512x2048 (arXiv 2204.07143).
        Workload("nat-ade", 4, (128, 512), 2, 2, 32, (7, 7)),
        # The same on pictures of 224x224 with windows of 3x3, as in that paper's ablation.
        Workload("nat-3x3", 64, (56, 56), 2, 2, 32, (3, 3)),
        # NAT-Base's stage 1 on pictures of 224x224, with its table of biases (arXiv 2204.07143).
        Workload("nat-bias", 64, (56, 56), 4, 4, 32, (7, 7), bias=True),
        # A window between small and large, as for HDiT's middle levels with more context (arXiv 2401.11605).
        Workload("mid-2d", 8, (128, 128), 8, 8, 64, (21, 21)),
        # The same with head dim 128, as in transformers for images from 2024 on (FLUX's heads).
        Workload("mid-128", 2, (128, 128), 24, 24, 128, (13, 13)),
        # HDiT's 7x7 level with one KV head, and its level with 16 register tokens.
        Workload("hdit-mqa", 8, (128, 128), 16, 1, 64, (7, 7)),
        Workload("hdit-reg", 8, (128, 128), 4, 4, 64, (7, 7), registers=16),
        # The same layer with 128 registers, between the usual few and a text's length.
        Workload("hdit-reg128", 8, (64, 64), 8, 8, 64, (13, 13), registers=128),
        # HDiT's 7x7 windows beside as many tokens of text as T5 gives to FLUX.
        Workload("hdit-text", 8, (64, 64), 8, 8, 64, (7, 7), registers=512),
        # fp32 training of the same layer; FP32 for weather below.
        Workload("fp32", 8, (128, 128), 4, 4, 64, (7, 7), dtype=FP32),
        # A U-Net's level of 640 channels with 8 heads of 80, as Stable Diffusion 1.5's second (unet/config.json).
        Workload("sdxl-80", 8, (64, 64), 8, 8, 80, (9, 9)),
        # Stable Diffusion 1.5's first level, 320 channels, 8 heads of 40.
        Workload("sd15-40", 8, (64, 64), 8, 8, 40, (9, 9), dtype=FP16),
        # PixArt-Sigma, DiT-XL: 1152 / 16 heads, 1024 pixels (PixArt-alpha/PixArt-Sigma-XL-2-1024-MS).
        Workload("pixart-72", 8, (64, 64), 16, 16, 72, (13, 13)),
        # Lumina-Image 2.0: 2304 / 24 heads over 8 (Alpha-VLLM/Lumina-Image-2.0, transformer/config.json).
        Workload("lumina-96", 4, (64, 64), 24, 8, 96, (17, 17)),
        # Sana 1.6B's cross attention has 20 heads of 112 (Efficient-Large-Model/Sana_1600M_1024px): these, locally.
        Workload("sana-112", 4, (64, 64), 20, 20, 112, (11, 11)),
        # FLUX.1's image tokens at 4K with GNA, arXiv 2504.16922: 80x80, stride 16; at 2K with 512 tokens of text.
        Workload("flux-gna", 1, (256, 256), 24, 24, 128, (80, 80), stride=16),
        Workload("flux-text", 1, (128, 128), 24, 24, 128, (40, 40), registers=512),
        # The same with 16 register tokens in place of text.
        Workload("flux-reg", 1, (128, 128), 24, 24, 128, (40, 40), registers=16),
        # Pictures read in raster order, causal on rows and columns: PixelCNN's field of view, Image GPT's 8 heads.
        Workload("causal-2d", 8, (64, 64), 8, 8, 64, (9, 9), causal=True),
        # Videos. LTX-2.5's decoder: 11x11x11 over 4 heads of 64, at 544x960 and 1080p.
        Workload("ltx-s5", 1, (61, 136, 240), 4, 4, 64, (11, 11, 11)),
        Workload("ltx-1080p", 1, (121, 272, 480), 4, 4, 64, (11, 11, 11)),
        # A causal video autoencoder or world model: causal in time only, grouped heads.
        Workload("causal-video", 1, (32, 64, 64), 16, 4, 64, (4, 7, 7), causal=(True, False, False)),
        # NUWA's 3D nearby attention: arXiv 2111.12417, 10x16x16 tokens, 20 heads of 64, 3x3x3 and causal.
        Workload("nuwa", 16, (10, 16, 16), 20, 20, 64, (3, 3, 3), causal=True),
        # HDiT with a time axis: 3x5x5, the smallest window in use over video.
        Workload("video-3x5x5", 2, (16, 64, 64), 4, 4, 64, (3, 5, 5)),
        # DiNAT-Base's stage 1 with a time axis, dilated in all three.
        Workload("dinat-video", 2, (16, 56, 56), 4, 4, 32, (3, 7, 7), dilation=(2, 8, 8)),
        # CogVideoX 2B: 13x30x45 tokens, 30 heads of 64 (THUDM/CogVideoX-2b, transformer/config.json), 5x15x15 of them.
        Workload("cogvideo", 1, (13, 30, 45), 30, 30, 64, (5, 15, 15)),
        # Wan 2.1 14B at 720p: 21x45x80 tokens, 40 heads of 128 (Wan-AI/Wan2.1-T2V-14B, config.json), 9x15x20 of them.
        Workload("wan", 1, (21, 45, 80), 40, 40, 128, (9, 15, 20)),
        # HunyuanVideo and Cosmos with GNA, arXiv 2504.16922.
        Workload("hunyuan-gna", 1, (30, 48, 80), 24, 24, 128, (18, 24, 24), stride=(16, 8, 8)),
        Workload("cosmos-gna", 1, (16, 44, 80), 32, 32, 128, (16, 32, 48), stride=(1, 8, 16)),
        # Weather in fp32. Aurora's first level at 0.25 degrees: 8 heads of 64 over 4x180x360 patches, windows of 2x6x12
        # (arXiv 2405.13063), odd and centred here.
        Workload("aurora", 1, (4, 180, 360), 8, 8, 64, (3, 7, 13), dtype=FP32),
        # Swin-sized heads of 32 over a globe at 1 degree, with 181 rows because both poles have one.
        Workload("globe", 4, (181, 360), 8, 8, 32, (7, 11), dtype=FP32),
        # The same with windows that wrap around in longitude, in bf16.
        Workload("globe-ring", 4, (181, 360), 8, 8, 32, (7, 11), periodic=(False, True)),
        # An ocean at 1 degree on the grid eORCA1 of NEMO (nemo-ocean.eu), a ring in longitude, with land as no keys.
        Workload("ocean", 4, (332, 362), 8, 8, 64, (7, 7), periodic=(False, True), land=True),
        # Images in their own shapes. NaViT packs them (arXiv 2307.06304); HDiT's 7x7 level here, from 64x64 to 224x152.
        Workload("packed-images", 1, (), 8, 2, 64, (7, 7), shapes=IMAGES),
        # gpt-oss's local layers (openai/gpt-oss-120b, config.json) on documents packed in training.
        Workload("packed-texts", 1, (), 64, 8, 64, (128,), causal=True, learned_sink=True, shapes=TEXTS),
        # Queries on another grid. A decoder's cross-attention to a latent of half the resolution, as in guided
        # upsampling, and pooling by attention from a coarse grid, as between stages of an encoder.
        Workload("upsample", 8, (128, 128), 8, 8, 64, (5, 5), key_spatial=(64, 64)),
        Workload("pool", 8, (64, 64), 8, 8, 64, (8, 8), key_spatial=(256, 256)),
    )
}

HEAVY = frozenset({"ltx-1080p"})
"""Rows that need more memory and time than a short run has. They run only if they are named."""

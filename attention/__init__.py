"""Attention layers of every kind, mixed by a layer plan, with the cache they decode from."""

from attention.cache import HybridCache as HybridCache
from attention.cache import cache_bytes as cache_bytes
from attention.config import AttentionConfig as AttentionConfig
from attention.kinds import build_attention as build_attention
from attention.plan import LayerPlan as LayerPlan

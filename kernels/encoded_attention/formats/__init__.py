"""Formats of encoded blocks: small frozen values that say how K or V lies in bytes, encode it and decode it."""

from kvtier.kernels.encoded_attention.formats.base import BlockFormat
from kvtier.kernels.encoded_attention.formats.fp8 import Fp8
from kvtier.kernels.encoded_attention.formats.int8 import Int8
from kvtier.kernels.encoded_attention.formats.kivi import KiviKeys, KiviValues
from kvtier.kernels.encoded_attention.formats.kv4 import Kv4
from kvtier.kernels.encoded_attention.formats.planes import BitPlanes

__all__ = ["BitPlanes", "BlockFormat", "Fp8", "Int8", "KiviKeys", "KiviValues", "Kv4"]

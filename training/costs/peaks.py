"""Peak FLOP/s of one device, by jax's device_kind, for model FLOPs utilisation.

Vendors' published figures for dense products (never 'with sparsity'). A kind
that is not here has no peak, and its utilisation is n/a: no guess by a
substring, since an H100 PCIe is not an H100 SXM.

A dtype's peak is that of how jax multiplies it by default: float32 in one
bfloat16 pass on a TPU, and as TF32 on an NVIDIA GPU from Ampere on.
"""

from collections.abc import Sequence

import jax

_TERA = 1e12

# TPU, per TensorCore, bfloat16. docs.cloud.google.com/tpu/docs/system-
# architecture-tpu-vm and its page for each version give a chip: v2 45, v3 123,
# v4 275, v5e 197, v5p 459, v6e 918, 7x 2307 TFLOP/s. A jax device is a chip or
# a core (v2, v3, 7x: always a core), so we count the device's cores.
_TPU_CORE = {
    'TPU v2': 45 / 2,
    'TPU v3': 123 / 2,
    'TPU v4': 275 / 2,
    'TPU v5 lite': 197,  # v5e
    'TPU v5e': 197,
    'TPU v5': 459 / 2,  # v5p
    'TPU v5p': 459 / 2,
    'TPU v6 lite': 918,  # v6e, Trillium
    'TPU v6e': 918,
    'TPU7x': 2307 / 2,  # Ironwood
}

# GPU: bfloat16, and float32 as TF32. Datasheets of the A100, L4, L40S, H100,
# H200, HGX B200, GH200 and GB200 (nvidia.com/en-us/data-center); those of
# Hopper and later print figures with sparsity, twice the dense ones here.
_GPU = {
    'NVIDIA A100-PCIE-40GB': (312, 156),
    'NVIDIA A100-SXM4-40GB': (312, 156),
    'NVIDIA A100 80GB PCIe': (312, 156),
    'NVIDIA A100-SXM4-80GB': (312, 156),
    'NVIDIA L4': (121, 60),
    'NVIDIA L40S': (362, 183),
    'NVIDIA H100 80GB HBM3': (989.4, 494.7),  # SXM
    'NVIDIA H100 PCIe': (756, 378),
    'NVIDIA H100 NVL': (835.5, 417.5),
    'NVIDIA H200': (989.4, 494.7),  # SXM
    'NVIDIA H200 NVL': (835.5, 417.5),
    'NVIDIA GH200 480GB': (990, 495),
    'NVIDIA B200': (2250, 1125),
    'NVIDIA GB200': (2500, 1250),
}


def flops(kind: str, dtype: str, cores: int = 1) -> float | None:
  """Returns a device's peak FLOP/s, or None where it is not known.

  Args:
    kind: jax.Device.device_kind.
    dtype: of the products: bfloat16 or float32.
    cores: TensorCores in one jax device; TPUs only.
  """
  if dtype not in ('bfloat16', 'float32'):
    return None
  if dtype == 'float32' and jax.config.jax_default_matmul_precision not in (
      None, 'default'):
    return None  # several passes: no published figure
  if kind in _TPU_CORE:
    return _TPU_CORE[kind] * cores * _TERA
  if kind in _GPU:
    return _GPU[kind][dtype == 'float32'] * _TERA
  return None


def total(devices: Sequence[jax.Device], dtype: str) -> float | None:
  """Returns the peak of all `devices` together, or None."""
  each = [flops(d.device_kind, dtype,
                d.num_cores if d.platform == 'tpu' else 1) for d in devices]
  return None if None in each else sum(each)

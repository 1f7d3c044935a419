"""The base's predictions on disk: training then needs neither the base nor its gradients. Ours.

``python -m mcm_jax.cache inspect|verify FOLDER`` tells what is in a cache, and whether it is whole.

Format 1. A cache is a folder of

=============================== ======================================================================================
``manifest.json``               what the cache was made of, its shards and their SHA-256; written last, so a folder
                                without one is no cache yet
``shard-00000.safetensors`` ... the examples in order, ``shard_examples`` in each file, the rest in the last
=============================== ======================================================================================

Any reader of safetensors reads a shard. Of n examples with K draws and V views (mcm_jax/data/views.py) it holds

=============== ========================== ==========================================================================
``index``       int32 ``[n]``              which examples
``t``           int32 ``[n, K]``           the timestep of each draw
``eps``         ``[n, K, h, w, C]``        the base's prediction, float16, bfloat16, float32, or int8
``eps_scale``   float32 ``[n, K, C]``      with int8 only: what each channel is multiplied by
``latent``      float16 ``[n, V, h, w, C]`` the autoencoder's latent of each view; draw d saw view d mod V
``image``       uint8 ``[n, V, H, W, 3]``  in its place, for a base that works on pixels
a modality      ``[n, V, h, w]``           on the same grid (``[n, V, H, W]``, the pictures', where the MCM has an
                                           encoder of conditions): labels as integers, maps as value * 255
``present``     uint8 ``[n, V, M]``        only where examples may miss modalities: 0 for those that this one lacks
=============== ========================== ==========================================================================

Noise, x_t and prompts are not there: they follow from the manifest's seed (:mod:`mcm_jax.draws`). Every value lies at a
place that the file's header gives, so a record is read by itself, by its position, and nothing is ever unpickled.

Why safetensors, and not ArrayRecord with Grain: records have one size, so an index is arithmetic, random reads are
1.7 times as fast from a cold page cache and 2.6 times from a warm one (benchmarks/results/cache_read.json), and a file
says to any tool what is in it.
"""

from mcm_jax.cache.reader import Cache
from mcm_jax.cache.settings import CacheSettings

__all__ = ["Cache", "CacheSettings"]

"""Other ways to control a diffusion model, beside MCM: same frozen base, same pairs, same judges.

============== ================================================================= ====================== =============
method         what is trained                                                   gradient through base  source
============== ================================================================= ====================== =============
``mcm-*``      a modulation of the base's prediction                             no                     the paper
``full``       the base, its first convolution widened to see the conditions     yes                    common
``controlnet`` a copy of the base's encoder, zero convolutions                   yes (decoder)          Zhang 2023
``adapter``    a net that sees the conditions alone, once a picture              yes                    Mou 2023
``lora``       low-rank changes of the base, the convolution widened as in full  yes                    Hu 2021
``judge``      nothing: a judge's gradient through the estimate of x0            yes, in sampling       Bansal 2023
============== ================================================================= ====================== =============

:mod:`.unet` lets any of them reach into the base's U-Net, :mod:`.nets` has their networks, :mod:`.method` says what one
is, :mod:`.methods` and :mod:`.judge` are the methods; :mod:`.world` is what they share, :mod:`.train` trains one,
:mod:`.judging` samples and judges it, :mod:`.run` does all, each at its best rate and guidance; :mod:`.cost` measures
steps, :mod:`.table` puts the results together.
``mcm-SIZE-twice``, ``-judged`` and ``-distilled`` are attempts to get more out of an MCM. Nothing of this is part of
``mcm_jax``.
"""

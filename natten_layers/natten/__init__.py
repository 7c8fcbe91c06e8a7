"""The functions of NATTEN 0.20 and 0.21 (https://natten.org), on this library's operations.

Programs written for NATTEN reach them as they reach NATTEN's own: in ``natten_layers``, ``natten_layers.functional``
and ``natten_layers.utils.varlen``. NATTEN's modules are in ``natten_layers.modules``.
"""

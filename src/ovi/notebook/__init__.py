"""What notebooks and programs use of ``ovi``; all of it is reached as ``ovi.NAME``, and loaded when first asked for."""

"""Base architectures: :mod:`.base` says what a row holds, one module has each row, :mod:`.table` lists
them."""

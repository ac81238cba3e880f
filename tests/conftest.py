"""Shared by all tests: shapes written in the core's signatures are checked at run time, and `tiny` is
importable."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["IMPROMPT_FEATURE_CACHE"] = "0"  # features of an earlier run would hide what encoders do now
sys.path.insert(0, str(Path(__file__).parent))

from jaxtyping import install_import_hook

install_import_hook("imprompt.adapter", "checked.check")

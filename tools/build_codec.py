#!/usr/bin/env python3
"""Write the source of the cffi module seqkv_edge._codec from its cdef file. Called by CMakeLists.txt.

    build_codec.py seqkv_edge/codec.cdef.h out.c     API mode: C source, linked with the codec
    build_codec.py seqkv_edge/codec.cdef.h out.py    no Python headers: the same names over lib/libseqkv
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from cffi import FFI
except ImportError:
    sys.exit("build_codec.py: cffi is missing: run 'python -m pip install cffi'")

# makes "from seqkv_edge._codec import ffi, lib" the same as in API mode
OPEN_LIBRARY = """
import os as _os, sys as _sys
_name = {"darwin": "libseqkv.dylib", "win32": "seqkv.dll"}.get(_sys.platform, "libseqkv.so")
lib = ffi.dlopen(_os.path.join(_os.path.dirname(_os.path.abspath(__file__)), "lib", _name))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cdef", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    ffi = FFI()
    try:
        ffi.cdef(args.cdef.read_text("utf-8"))
    except Exception as e:  # cffi's own and pycparser's errors
        sys.exit(f"build_codec.py: {args.cdef}: {e}")
    if args.out.suffix == ".py":
        ffi.set_source("seqkv_edge._codec", None)
        ffi.emit_python_code(str(args.out))
        with args.out.open("a", encoding="utf-8") as f:
            f.write(OPEN_LIBRARY)
    else:
        ffi.set_source("seqkv_edge._codec", '#include "seqkv.h"')
        ffi.emit_c_code(str(args.out))


if __name__ == "__main__":
    main()

#!/usr/bin/env bash
# Regenerates the Python beside each .proto. The generated code is committed; `make lint` fails when it drifts.
set -euo pipefail
cd "$(dirname "$0")"
find nitsum_api -name '*_pb2*.py*' -delete
python -m grpc_tools.protoc -I. -I"$(python -c 'import importlib.resources as r; print(r.files("grpc_tools") / "_proto")')" \
  --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. $(find nitsum_api -name '*.proto' | sort)
# A file without services has no use for an empty stub module.
grep -L '^service ' $(find nitsum_api -name '*.proto') | sed 's/\.proto$//' | while read -r f; do rm -f "${f}_pb2_grpc.py" "${f}_pb2_grpc.pyi"; done

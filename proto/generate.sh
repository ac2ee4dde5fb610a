#!/usr/bin/env bash
# Regenerates what is committed beside the .proto files: the Python, and the contract's image, against which a change must not break what
# peers of the same CONTRACT_VERSION send. `--check` writes nothing and names what differs.
set -euo pipefail
cd "$(dirname "$0")"
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT

version=$(python -c 'from nitsum_api import CONTRACT_VERSION; print(CONTRACT_VERSION)')
image="contract-$version.binpb"
(cd .. && buf build --exclude-source-info -o "$new/$image")
if [ -e "$image" ]; then
  (cd .. && buf breaking --against "proto/$image") || { echo "peers of contract $version would misread this: keep it, or raise CONTRACT_VERSION" >&2; exit 1; }
fi

protos=$(find nitsum_api -name '*.proto' | LC_ALL=C sort)
include=$(python -c 'import importlib.resources as r; print(r.files("grpc_tools") / "_proto")')
# shellcheck disable=SC2086 # a list of words
python -m grpc_tools.protoc -I. -I"$include" --python_out="$new" --grpc_python_out="$new" --mypy_out="$new" --mypy_grpc_out="$new" $protos \
  >"$new/log" 2>&1 || { cat "$new/log" >&2; exit 1; }
for proto in $protos; do # a file without services has no use for an empty stub module
  grep -q '^service ' "$proto" || rm -f "$new/${proto%.proto}_pb2_grpc.py" "$new/${proto%.proto}_pb2_grpc.pyi"
done

listed() { (cd "$1" && find . \( -name '*_pb2*.py*' -o -name 'contract-*.binpb' \) -not -path '*/__pycache__/*'); }
status=0
for f in $({ listed . && listed "$new"; } | sort -u); do
  if ! cmp -s "$new/$f" "$f"; then
    if [ "${1:-}" = --check ]; then
      echo "proto/${f#./} is not what its .proto says: run make generate and commit" >&2
      status=1
    elif [ -e "$new/$f" ]; then
      cp "$new/$f" "$f"
    else
      rm "$f"
    fi
  fi
done
exit $status

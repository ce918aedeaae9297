#!/bin/sh
# Install the build of torch that this machine can use: install_torch.sh PYTHON auto|cpu|cuda|as-is
#
# On Linux the wheel that PyPI has is the CUDA build, with gigabytes of NVIDIA's packages. uv knows torch's own index, which has
# one for CPUs alone; where that cannot be reached, pip takes what it finds. A torch that is there already stays.
set -eu
python=$1 want=$2
torch=$(grep '^torch==' "$(dirname "$0")/../constraints.txt")

case $want in
    auto) if nvidia-smi >/dev/null 2>&1; then want=cuda; else want=cpu; fi ;;
    cpu | cuda) ;;
    as-is) exit 0 ;;
    *) echo "TORCH=$want: use auto, cpu, cuda or as-is" >&2 && exit 2 ;;
esac
if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
    exit 0
fi
case $want in
    cpu) backend=cpu; echo "installing $torch for the CPU: 200 MB to download; with the rest 1.3 GB of disk, some minutes (TORCH=cuda for an NVIDIA GPU)" ;;
    cuda) backend=auto; echo "installing $torch for CUDA: several GB to download (TORCH=cpu for the CPU alone)" ;;
esac
export UV_HTTP_TIMEOUT=20 UV_HTTP_RETRIES=0
if "$python" -m pip install --quiet --disable-pip-version-check uv 2>/dev/null &&
    "$python" -m uv pip install --quiet --python "$python" --torch-backend "$backend" "$torch" 2>/dev/null; then
    exit 0
fi
echo "torch's own index cannot be reached: pip decides which build it takes; PyPI's for Linux is CUDA's, several GB to download"
"$python" -m pip install --quiet --disable-pip-version-check "$torch"

#!/bin/sh
# Make a separate environment in which tests/embed/test_open_clip.py runs, and run it.
#   tests/embed/open_clip_env.sh FOLDER
# torchvision goes in without its dependencies: on a CPU build of torch it does not import as it is (the test
# declares what it misses), and it would break transformers in the main environment.
set -eu
folder=${1:?usage: open_clip_env.sh FOLDER}
repository=$(cd "$(dirname "$0")/../.." && pwd)

[ -x "$folder/bin/python" ] || python3 -m venv "$folder"
pip="$folder/bin/pip install --quiet --disable-pip-version-check"
constraint="$folder/constraints.txt"
echo "torch==2.13.0" > "$constraint"
$pip torch==2.13.0
$pip --no-deps torchvision==0.28.0 open_clip_torch==3.3.0 timm==1.0.31 ftfy==6.3.1
$pip -c "$constraint" numpy pillow safetensors huggingface_hub wcwidth regex tqdm pyyaml pytest

# The package without its compiled extension: links into the working tree, kernels/ as amg.kernels.
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
rm -rf "$site/amg"
mkdir "$site/amg"
for entry in "$repository"/amg/*; do
    case $entry in *.so | */__pycache__) ;; *) ln -s "$entry" "$site/amg/" ;; esac
done
ln -s "$repository/kernels" "$site/amg/kernels"

cd "$repository"
exec "$folder/bin/pytest" -p no:cacheprovider tests/embed/test_open_clip.py

#!/bin/bash
# site.sh PYTHON: makes site.ext4, what engines need in the guest: the packages that PYTHON has, in the same versions, for the
# guest's interpreter.
. "$(dirname "$0")/common.sh"
names='absl-py etils filelock flax jax jaxlib jaxtyping jinja2 markdown-it-py markupsafe mdurl ml_dtypes msgpack msgspec numpy obstore
  opt_einsum optax Pygments PyYAML rich safetensors scipy tokenizers tqdm treescope typing_extensions wadler_lindig xxhash'
packages=$("$1" - $names <<'END'
import importlib.metadata, sys
print(*(f"{name}=={importlib.metadata.version(name)}" for name in sys.argv[1:]))
END
)
want=$(sha256sum <<<"$packages$(cat "$0")")
[ "$want" != "$(cat "$cache/site.made" 2>/dev/null)" ] || exit 0
say "making the guest's packages, once"
site=$cache/site wheels=$cache/wheels
rm -rf "$site" "$wheels"
mkdir -p "$site" "$wheels"
platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64)
"$1" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$wheels" --only-binary :all: \
  --python-version "${python#python}" --implementation cp "${platforms[@]/#/--platform=}" $packages 2>"$cache/site.log" || {
  # Where the index answers and lacks a package, that is a failure.
  grep -Eq "NewConnectionError|ConnectTimeout|ProxyError|Temporary failure|Connection.*(refused|reset)" "$cache/site.log" &&
    no_network "the guest's packages can't be fetched: $(tail -n 1 "$cache/site.log")"
  cat "$cache/site.log" >&2
  exit 1
}
for wheel in "$wheels"/*.whl; do "$1" -m zipfile -e "$wheel" "$site"; done
find "$site" -name tests -type d -prune -exec rm -rf {} +
guest_python -m compileall -q -s "$site" -p /site "$site" >/dev/null 2>&1 || true # only faster
size=$(du -sm "$site" | cut -f1)
mke2fs -q -t ext4 -O ^has_journal -m 0 -N 30000 -d "$site" "$cache/site.new" $((size + 60))M >/dev/null
mv "$cache/site.new" "$cache/site.ext4"
rm -rf "$site" "$wheels"
echo "$want" >"$cache/site.made"
say "packages: $(wc -w <<<"$packages"), $size MB"

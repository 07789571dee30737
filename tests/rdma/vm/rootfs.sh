#!/bin/bash
# Makes root.ext4: Python, numpy, pytest, pyverbs and rdma-core. apt finds the packages, which are unpacked and nothing more.
. "$(dirname "$0")/common.sh"
prepare_apt
root=$cache/rootfs
rm -rf "$root" "$cache/debs"
mkdir -p "$root"/{proc,sys,dev,tmp,run,mnt,root,host,repo,site,etc} "$root"/usr/{bin,sbin,lib,lib64}
for folder in bin sbin lib lib64; do ln -s "usr/$folder" "$root/$folder"; done
unused='^(systemd|udev|libsystemd-shared|libudev1|dpkg|tar|debconf|libdebconf.*|mount|passwd|login.defs|adduser|base-passwd'
unused+='|libpam-.*|libsemanage.*|libsepol2|tzdata|openssl-provider-legacy|python3-numpy-dev|init-system-helpers'
unused+='|media-types|(lib)?perl.*)$'
packages=$(guest_apt apt-get -s install --no-install-recommends python3-pyverbs python3-numpy python3-pytest ibverbs-utils \
  iproute2 busybox-static | awk '$1 == "Inst" { print $2 }' | grep -Ev "$unused")
[ -n "$packages" ] || no_network "apt finds no packages of $suite"
download "$cache/debs" $packages
for package in $packages; do
  dpkg --fsys-tarfile "$cache/debs/${package}"_*.deb | tar -x -C "$root" --keep-directory-symlink \
    --exclude='./usr/share/doc' --exclude='./usr/share/man' --exclude='./usr/share/locale'
done
# numpy.testing imports one module of numpy's own tests; the rest of them are the larger half of the package.
find "$root/usr/lib/python3/dist-packages/numpy" -path '*/tests/*' -type f ! -name __init__.py ! -name _natype.py -delete
for name in sh cat cp cut ls mount umount sleep dmesg kill mkdir uname sync echo; do
  [ -e "$root/bin/$name" ] || ln -s busybox "$root/bin/$name"
done
lib=$root/usr/lib/x86_64-linux-gnu
ln -sf blas/libblas.so.3 "$lib/libblas.so.3"
ln -sf lapack/liblapack.so.3 "$lib/liblapack.so.3"
for folder in "usr/lib/$python" usr/lib/python3; do
  guest_python -m compileall -q -s "$root" -p / "$root/$folder" >/dev/null 2>&1 || true # only faster
done
size=$(du -sm "$root" | cut -f1)
mke2fs -q -t ext4 -O ^has_journal -m 0 -N 30000 -d "$root" "$cache/rootfs.new" $((size + 60))M >/dev/null
mv "$cache/rootfs.new" "$cache/rootfs.ext4"
say "root file system: $(wc -w <<<"$packages") packages, $size MB"
rm -rf "$cache/debs" # the root's folder stays: its interpreter compiles the guest's packages

#!/bin/busybox sh
# First program of the guest: loads modules, mounts the root file system (read-only, with memory over it), the repository
# and the folder of results, and goes on there.
/bin/busybox mkdir -p /proc /sys /dev /host /rw /guest /bin /sbin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules.order); do insmod /modules/$module || echo "no module $module" >/dev/console; done
mount -t ext4 -o ro /dev/vda /host
mount -t tmpfs tmpfs /rw
mkdir -p /rw/upper /rw/work
mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work overlay /guest
for folder in proc sys dev; do mount -o move /$folder /guest/$folder; done
mkdir -p /guest/dev/shm /guest/dev/pts
mount -t tmpfs tmpfs /guest/dev/shm
mount -t tmpfs tmpfs /guest/run
[ ! -e /guest/dev/vdb ] || mount -t ext4 -o ro /guest/dev/vdb /guest/site
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,rw,cache=none out /guest/mnt
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,ro,cache=loose repo /guest/repo
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp
exec chroot /guest /bin/sh /mnt/guest.sh

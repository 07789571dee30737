#!/bin/busybox sh
# First program of the guest: loads modules, mounts the root file system (read-only, with memory over it), the repository
# and the folder of results, and goes on there.
/bin/busybox mkdir -p /proc /sys /dev /host /rw /root /bin /sbin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules.order); do insmod /modules/$module || echo "no module $module" >/dev/console; done
mount -t ext4 -o ro /dev/vda /host
mount -t tmpfs tmpfs /rw
mkdir -p /rw/upper /rw/work
mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work overlay /root
for folder in proc sys dev; do mount -o move /$folder /root/$folder; done
mkdir -p /root/dev/shm /root/dev/pts
mount -t tmpfs tmpfs /root/dev/shm
mount -t tmpfs tmpfs /root/run
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,rw,cache=none out /root/mnt
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,ro,cache=loose repo /root/repo
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
exec chroot /root /bin/sh /mnt/guest.sh

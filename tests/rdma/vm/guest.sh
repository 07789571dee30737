#!/bin/sh
# In the guest's root file system: two soft-RoCE devices on the two ends of a link, then the command. They are in one
# network namespace (soft-RoCE knows no other), so their packets have to be made to go over the link.
say() { echo "[guest $(cut -d' ' -f1 /proc/uptime)s] $*"; }
ip() { /bin/ip "$@"; } # the shell would take its own
: >/mnt/started
ulimit -l unlimited
[ -z "$(ls /site)" ] || export PYTHONPATH=/site
ip link set lo up
ip link add veth0 type veth peer name veth1
echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
for end in 0 1; do
  ip link set veth$end mtu 9000 up
  ip addr add 10.9.1.$((end + 1))/24 dev veth$end
  ip neigh replace 10.9.1.$((end + 1)) lladdr "$(cat /sys/class/net/veth$end/address)" dev veth$((1 - end))
  echo 0 >/proc/sys/net/ipv4/conf/veth$end/rp_filter
  echo 1 >/proc/sys/net/ipv4/conf/veth$end/accept_local
done
rdma link add rxea type rxe netdev veth0
rdma link add rxeb type rxe netdev veth1
rdma link
if ! rdma link | grep -q 'rxea.*ACTIVE' || ! rdma link | grep -q 'rxeb.*ACTIVE'; then
  say "a soft-RoCE device is missing"
  echo 1 >/mnt/status
  sync
  echo o >/proc/sysrq-trigger
  sleep 60
fi
say "kernel $(uname -r), devices ready"
# In memory, where compiled modules can be written beside their sources.
mkdir /tmp/repo
for part in jaxdual models pallas_kernels tests pyproject.toml; do cp -r /repo/$part /tmp/repo/; done
cd /tmp/repo && sh /mnt/command.sh
status=$?
say "exit status $status"
echo $status >/mnt/status
sync
echo o >/proc/sysrq-trigger
while :; do sleep 1; done

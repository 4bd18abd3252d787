#!/usr/bin/env bash
# A real SLURM on this machine alone, for the tests: munged, slurmctld and slurmd, as root, with all their files in a
# folder that must not exist yet. Debian: apt-get install slurm-wlm munge. Jobs in the partition `urgent` preempt those
# in `main`.
#     tests/slurm/start.sh FOLDER [PORT] && export SLURM_CONF=FOLDER/slurm.conf && sinfo
#     tests/slurm/stop.sh FOLDER
set -euo pipefail
folder=$1
port=${2:-26817} # slurmctld's; slurmd has the next one
mkdir -m 755 "$folder" "$folder/state" "$folder/spool"
host=$(hostname -s)

# munge vouches for who sends a message: slurmctld, slurmd and the commands talk through its socket
mkdir -m 755 -p "$folder/munge"
head -c 1024 /dev/urandom > "$folder/munge/key"
chmod 600 "$folder/munge/key"
chown -R munge "$folder/munge"
# the paths above it are the caller's, and munged mistrusts what others could write to: hence --force
su -s /bin/sh munge -c "exec $(command -v munged) --force --socket '$folder/munge/socket' --key-file '$folder/munge/key' \
    --pid-file '$folder/munge/munged.pid' --log-file '$folder/munge/munged.log' --seed-file '$folder/munge/seed'"

cat > "$folder/slurm.conf" <<CONF
ClusterName=gptlab
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=$port
SlurmdPort=$((port + 1))
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmctldParameters=preempt_send_user_signal
MpiDefault=none
ReturnToService=2
KillWait=15
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 CPUs=2
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
CONF
export SLURM_CONF=$folder/slurm.conf
slurmctld
slurmd
for _ in $(seq 50); do
    sinfo -h -o %t 2>/dev/null | grep -q idle && exit 0
    sleep 0.2
done
echo "the node is not idle after 10 seconds; $folder/slurmctld.log and slurmd.log say why" >&2
tail -5 "$folder"/slurm*.log >&2
exit 1

#!/usr/bin/env bash
# A real Slurm on this machine alone, for tests and for trying a sweep out: munged, slurmctld and slurmd as root, without
# systemd and without accounting. Debian's packages are installed where they are missing.
#   eval "$(scripts/slurm_here.sh start FOLDER)"     start it and let this shell use it
#   scripts/slurm_here.sh stop FOLDER
set -euo pipefail

usage() { sed -n '2,5p' "$0" | cut -c3- >&2; exit 2; }
command=${1:-} folder=${2:-}
[ -n "$folder" ] || usage

install() {
  command -v slurmctld slurmd srun munged >/dev/null && return
  [ "$(id -u)" = 0 ] || { echo "slurm_here: Slurm is not installed, and installing it takes root" >&2; exit 3; }
  command -v apt-get >/dev/null || { echo "slurm_here: Slurm is not installed, and there is no apt-get" >&2; exit 3; }
  exec 9>/tmp/welore-apt.lock && flock 9  # tests in other processes install too, and apt does not wait
  apt-get update -qq >&2 || true
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge >&2 9>&- || { echo "slurm_here: apt-get cannot install Slurm" >&2; exit 3; }
  exec 9>&-
}

free_port() {  # one that nobody listens on, so that several can run on one machine
  local port
  while port=$((20000 + RANDOM % 10000)); (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  echo "$port"
}

configure() {
  local host memory cpus
  cpus=$(env -u OMP_NUM_THREADS nproc)
  cpus=$((cpus > 2 ? cpus : 2))  # a job of two processes is to run on any machine
  host=$(hostname -s)
  memory=$(($(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) - 1024))
  cat >"$folder/slurm.conf" <<CONF
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# The credential of a job lives for seconds: a requeued job waits for the old one to expire, two minutes by default.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
MessageTimeout=30
KillWait=10
MinJobAge=600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
}

# submitit asks sacct how its jobs are, and sacct has nothing to say without a data base. The controller knows of jobs
# that ended in the last MinJobAge seconds.
stand_in_for_sacct() {
  cat >"$folder/bin/sacct" <<'SACCT'
#!/bin/sh
echo 'JobID|State|NodeList'
scontrol show job -o | sed -n \
  -e 's/^JobId=\([0-9]*\) ArrayJobId=\([0-9]*\) ArrayTaskId=\([0-9]*\) .*JobState=\([A-Z_]*\) .*/\2_\3|\4|/p;t' \
  -e 's/^JobId=\([0-9]*\) ArrayJobId=\([0-9]*\) ArrayTaskId=\([^ ]*\) .*JobState=\([A-Z_]*\) .*/\2_[\3]|\4|/p;t' \
  -e 's/^JobId=\([0-9]*\) .*JobState=\([A-Z_]*\) .*/\1|\2|/p'
SACCT
  chmod +x "$folder/bin/sacct"
}

start() {
  install
  mkdir -p "$folder"/{bin,state,spool}
  folder=$(cd "$folder" && pwd)
  configure
  stand_in_for_sacct
  (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
  export SLURM_CONF=$folder/slurm.conf
  {
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
      --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    slurmctld -c
    slurmd
    for _ in $(seq 300); do
      [ "$(timeout 5 sinfo --noheader --partition=main --format=%T 2>/dev/null)" = idle ] && break
      sleep .1
    done
    timeout 10 sinfo || { tail -n 5 "$folder"/*.log; exit 1; }
  } >&2
  echo "export SLURM_CONF=$SLURM_CONF PATH=$folder/bin:\$PATH"
}

stop() {
  local name pid
  for name in slurmd slurmctld munged; do
    pid=$(cat "$folder/$name.pid" 2>/dev/null) || continue
    kill "$pid" 2>/dev/null || continue
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || continue 2; sleep .1; done
    kill -9 "$pid" 2>/dev/null || true  # a slurmd whose controller is gone does not hear TERM
  done
}

case $command in
  start) start ;;
  stop) stop ;;
  *) usage ;;
esac

#!/usr/bin/env bash
# A real Slurm cluster on one host: munged, slurmctld and several slurmd, without systemd; for tests, and for
# trying things out before a queue is waited in. Debian 12 and Ubuntu; touches nothing outside its own folder.
#
#   env/local_slurm.sh install       packages, as root; nothing if they are there
#   env/local_slurm.sh packages      their names
#   env/local_slurm.sh start         waits until all nodes are idle: about a second
#   eval "$(env/local_slurm.sh env)" then: sinfo, sbatch --nodes=2 slurm/fashion_mnist.sh, squeue
#   env/local_slurm.sh status | logs
#   env/local_slurm.sh stop          jobs and daemons; the folder stays
#
# Partitions: main, and urgent, whose jobs preempt those of main. Settings (environment):
#   LOCAL_SLURM_ROOT         state, logs and sockets; a short path        /tmp/local-slurm-UID
#   LOCAL_SLURM_NODES        nodes                                        4
#   LOCAL_SLURM_CPUS         CPUs that each node claims to have           32
#   LOCAL_SLURM_GPUS         GPUs that each node claims to have           4
#   LOCAL_SLURM_ACCOUNTING   1: slurmdbd and MariaDB, so that sacct works 0
#   LOCAL_SLURM_PORT         first of the ports                           16817
set -euo pipefail

root=${LOCAL_SLURM_ROOT:-/tmp/local-slurm-$UID}
nodes=${LOCAL_SLURM_NODES:-4}
cpus=${LOCAL_SLURM_CPUS:-32}
gpus=${LOCAL_SLURM_GPUS:-4}
accounting=${LOCAL_SLURM_ACCOUNTING:-0}
port=${LOCAL_SLURM_PORT:-16817} # slurmctld; +1 slurmdbd; +10 and on the nodes
host=$(hostname -s)
user=$(id -un)
socket=$root/munge/socket/munge
export SLURM_CONF=$root/slurm.conf

main() {
  case ${1:-} in
    install) install_packages ;;
    packages) packages ;;
    start) start ;;
    stop) stop ;;
    env) printf 'export SLURM_CONF=%q\n' "$SLURM_CONF" ;;
    status) sinfo && squeue ;;
    logs) tail -n 40 "$root"/log/*.log ;;
    *) sed -n '2,/^set /{s/^# \{0,1\}//;/^set /!p}' "$0" && exit 2 ;;
  esac
}

packages() {
  echo munge slurmctld slurmd slurm-client slurm-wlm-basic-plugins libpmix2
  [[ $accounting != 1 ]] || echo slurmdbd slurm-wlm-mysql-plugin mariadb-server
}

install_packages() {
  local missing=() package
  for package in $(packages); do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [[ ${#missing[@]} -gt 0 ]] || return 0
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

start() {
  make_folders
  slurm_conf >"$SLURM_CONF"
  gres_conf >"$root/gres.conf"
  task_prolog >"$root/task_prolog.sh" && chmod 755 "$root/task_prolog.sh"
  start_munge
  [[ $accounting != 1 ]] || start_accounting
  alive slurmctld || slurmctld -f "$SLURM_CONF"
  local i
  for ((i = 1; i <= nodes; i++)); do
    alive "slurmd-node$i" || slurmd -f "$SLURM_CONF" -N "node$i"
  done
  wait_for 60 "idle nodes" all_idle
}

make_folders() {
  mkdir -p "$root"/{run,log,spool/ctld,munge/socket} && chmod 755 "$root" "$root"/{run,log,spool,munge/socket}
  chmod 711 "$root/munge"
  local i
  for ((i = 1; i <= nodes; i++)); do
    mkdir -p "$root/spool/node$i" "$root/tmp/node$i" && chmod 1777 "$root/tmp/node$i"
  done
}

slurm_conf() {
  cat <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$socket
StateSaveLocation=$root/spool/ctld
SlurmdSpoolDir=$root/spool/%n
SlurmctldPidFile=$root/run/slurmctld.pid
SlurmdPidFile=$root/run/slurmd-%n.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd-%n.log
# No cgroups here: no limits of memory, no binding.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
# PMIx's folder is /TmpFS/spmix_appdir_USER_JOB.STEP: nodes on one host must not find each other's.
TmpFS=$root/tmp/%n
TaskProlog=$root/task_prolog.sh
ReturnToService=2
# More CPUs than the host has.
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
JobRequeue=1
KillWait=5
MinJobAge=3600
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# A job that is preempted gets its own --signal when the grace time begins, otherwise TERM.
SlurmctldParameters=preempt_send_user_signal
END
  if [[ $accounting == 1 ]]; then
    # For slurmdbd the munge socket is named here; AuthInfo is not looked at.
    cat <<END
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 1))
AccountingStoragePass=$socket
END
  else
    echo "AccountingStorageType=accounting_storage/none"
  fi
  local i
  for ((i = 1; i <= nodes; i++)); do
    echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 9 + i)) CPUs=$cpus Boards=1" \
      "SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=4000 Gres=gpu:$gpus"
  done
  cat <<END
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=urgent Nodes=ALL Default=NO MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
END
}

# Slurm counts a node's GPUs by their device files; any file does, though its log complains.
gres_conf() {
  local i
  for ((i = 0; i < gpus; i++)); do
    touch "$root/gpu$i"
    echo "Name=gpu File=$root/gpu$i"
  done
}

# What this prints goes into the environment of every task. All nodes are this host, whose names need not resolve,
# and share its cores. Open MPI's shared memory is named by host, user and job, so that two "nodes" would break
# each other's: each gets a folder of its own, they talk over loopback, and idle processes give way.
task_prolog() {
  cat <<END
#!/bin/sh
echo export MASTER_ADDR=127.0.0.1
echo export OMP_NUM_THREADS=1
echo export OMPI_MCA_btl_vader_backing_directory=$root/tmp/\$SLURMD_NODENAME
echo export OMPI_MCA_btl_tcp_if_include=lo
echo export OMPI_MCA_oob_tcp_if_include=lo
echo export OMPI_MCA_mpi_yield_when_idle=1
END
}

start_munge() {
  [[ -f $root/munge/key ]] || (umask 077 && head -c 1024 /dev/urandom >"$root/munge/key")
  alive munged || munged --force --key-file="$root/munge/key" --socket="$socket" --pid-file="$root/run/munged.pid" \
    --log-file="$root/log/munged.log" --seed-file="$root/munge/seed"
  wait_for 10 munged munge --no-input --socket="$socket"
}

start_accounting() {
  local database=$root/run/mariadb.sock
  if ! alive mariadb; then
    mkdir -p "$root/db" && chown mysql: "$root/db" "$root/run"
    [[ -d $root/db/mysql ]] || mariadb-install-db --no-defaults --user=mysql --datadir="$root/db" \
      --auth-root-authentication-method=socket --skip-test-db >"$root/log/mariadb-install.log" 2>&1
    mariadbd --no-defaults --user=mysql --datadir="$root/db" --socket="$database" --skip-networking \
      --pid-file="$root/run/mariadb.pid" --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 \
      >"$root/log/mariadb.log" 2>&1 </dev/null &
  fi
  wait_for 30 mariadb mariadb --socket="$database" --execute='select 1'
  # slurmdbd refuses a file that others can read. It has no setting for the database's socket.
  (umask 077 && slurmdbd_conf >"$root/slurmdbd.conf")
  alive slurmdbd || MYSQL_UNIX_PORT=$database slurmdbd
  wait_for 30 slurmdbd sacctmgr --noheader list cluster
  sacctmgr --noheader list cluster format=cluster%40 | grep -qw local || sacctmgr -i add cluster local >/dev/null
}

slurmdbd_conf() {
  cat <<END
AuthType=auth/munge
AuthInfo=socket=$socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((port + 1))
SlurmUser=$user
LogFile=$root/log/slurmdbd.log
PidFile=$root/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
END
}

stop() {
  if alive slurmctld; then
    scancel --user="$user" || true
    wait_for 15 "the end of the jobs" no_jobs || true
  fi
  # All at once but for what they need, which comes in its order.
  end "$root"/run/slurmd-*.pid "$root/run/slurmctld.pid"
  local name
  for name in slurmdbd mariadb munged; do end "$root/run/$name.pid"; done
}

end() { # end PIDFILE...
  local file pid
  for file in "$@"; do [[ ! -f $file ]] || kill "$(<"$file")" 2>/dev/null || true; done
  for file in "$@"; do
    [[ -f $file ]] || continue
    # The daemon may remove the file on its way out.
    pid=$(cat "$file" 2>/dev/null) || continue
    wait_for 10 "the end of $(basename "$file" .pid)" gone "$pid" || kill -KILL "$pid" 2>/dev/null || true
    rm -f "$file"
  done
}

alive() { [[ -f $root/run/$1.pid ]] && kill -0 "$(<"$root/run/$1.pid")" 2>/dev/null; }
gone() { ! kill -0 "$1"; }
no_jobs() { [[ -z $(squeue --noheader) ]]; }
all_idle() { [[ $(sinfo --noheader --partition=main --Node --format=%t | grep -cE '^(idle|mix|alloc)$') == "$nodes" ]]; }

wait_for() { # wait_for SECONDS WHAT COMMAND...
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    if ((SECONDS >= end)); then
      echo "local_slurm.sh: waited in vain for $what; see $root/log" >&2
      return 1
    fi
    sleep 0.1
  done
}

main "$@"

# shellcheck shell=bash
# Shared by the scripts of this folder. Each sets RECIPE, SAMPLE and smoke() (data and settings of a smoke run) and
# root; then it sources this file.
#
#   sbatch --nodes=4 slurm/vit_b16.sh --train.epochs 30                    in the repository's root
#   SITE=horeka slurm/vit_b16.sh --nodes=4 -- --train.epochs 30            submits itself, with the site's options
#   OIALR_SMOKE=1 sbatch --nodes=2 slurm/vit_b16.sh                        a few steps on CPUs, on synthetic data
#   sbatch --array=0-2 slurm/vit_b16.sh                                    one run for each seed
#
# Settings (environment):
#   SITE              name of a file in hpc_oialr/launch/sites, or a path  generic
#                     (its sbatch options apply only when the script submits itself)
#   VARIANT=dense     the dense baseline of the recipe
#   VARIANT=paper     the published method (arXiv 2401.08505) with the published settings
#   OIALR_OUT         run folder; an unfinished run in it is resumed       OIALR_RUNS/RECIPE-JOB
#   OIALR_RUNS        where run folders go                                 runs
#   OIALR_VENV        virtual environment                                  .venv of the repository, if there is one
#   OIALR_IMAGE       Apptainer image, instead
#   OIALR_MPI         how srun starts MPI (pmix, pmi2)                     the site's
#   OIALR_MAX_REQUEUES                                                     20
set -eo pipefail
root=$(cd "$root" && pwd)
venv=${OIALR_VENV:-$root/.venv}

# The package: beside this folder, or where pip has installed it.
package=$root/hpc_oialr
if [[ ! -d $package ]]; then
  python=python3
  [[ ! -x $venv/bin/python ]] || python=$venv/bin/python
  where='import importlib.util as u; print(u.find_spec("hpc_oialr").submodule_search_locations[0])'
  if ! package=$("$python" -c "$where" 2>/dev/null); then
    echo "oialr: error: $python has no hpc_oialr; activate its environment, or set OIALR_VENV" >&2
    exit 2
  fi
fi

sites=$package/launch/sites
site=${SITE:-generic}
[[ $site == */* ]] || site=$sites/$site.sh
if [[ ! -f $site ]]; then
  echo "oialr: error: SITE is '${SITE:-}', but there is no $site; there are: $(cd "$sites" && echo *.sh)" >&2
  exit 2
fi
case ${VARIANT:-} in
  '' | dense | paper) ;;
  *)
    echo "oialr: error: VARIANT is '$VARIANT'; must be dense or paper, or not set" >&2
    exit 2
    ;;
esac
SITE_SBATCH=() SITE_SRUN=() SITE_MPI=
# shellcheck source=../hpc_oialr/launch/sites/generic.sh
source "$site"

# On a login node: submit this script with the site's sbatch options, then those before --; the rest are settings.
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  options=()
  while [[ $# -gt 0 && $1 != -- ]]; do options+=("$1"); shift; done
  [[ $# -eq 0 ]] || shift
  export OIALR_ROOT=$root
  exec sbatch --export=ALL "${SITE_SBATCH[@]}" "${options[@]}" "$root/slurm/$(basename "$0")" "$@"
fi

# The requeue at the end, signals, variables, and srun's own options.
# shellcheck source=../hpc_oialr/launch/job.sh
source "$package/launch/job.sh"

[[ ${1:-} != -- ]] || shift
if [[ -n ${OIALR_IMAGE:-} ]]; then
  oialr=(apptainer exec --nv --bind "$root,$PWD" "$OIALR_IMAGE" python -m hpc_oialr)
else
  # shellcheck source=/dev/null
  [[ ! -f $venv/bin/activate ]] || source "$venv/bin/activate"
  oialr=(python -m hpc_oialr)
fi
[[ $package != "$root"/* ]] || export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

srun=(srun "${SITE_SRUN[@]}")
mpi=${OIALR_MPI:-$SITE_MPI}
[[ -z $mpi ]] || srun+=(--mpi="$mpi")

settings=()
name=$RECIPE
job=$SLURM_JOB_ID
if [[ -n ${VARIANT:-} ]]; then
  settings+=("--$VARIANT")
  name+=-$VARIANT
fi
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  settings+=(--train.seed "$SLURM_ARRAY_TASK_ID")
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi
runs=${OIALR_RUNS:-runs}
if [[ ${OIALR_SMOKE:-} == 1 ]]; then
  samples=$runs/samples-$job
  [[ -z ${SAMPLE:-} ]] || "${oialr[@]}" data sample "$SAMPLE" "$samples"
  settings+=(--train.device cpu --train.workers 0 --train.evaluation_batch 32)
  smoke
  srun+=(--ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
fi
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || srun+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")

"${srun[@]}" "${oialr[@]}" train "$RECIPE" --out "${OIALR_OUT:-$runs/$name-$job}" --continue "${settings[@]}" "$@"

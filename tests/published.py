"""The published commands, word for word: what users paste. Upper-case letters stand for paths, as they do there."""

BASE = "deit_base_distilled_patch16_224"
LAUNCH = "-m torch.distributed.launch --nproc_per_node=8 --use_env"
PRUNE = (
    "-m torch.distributed.launch --nproc_per_node=4 --use_env main_full_global_latency.py "
    f"--model {BASE} --epochs 50 --num_workers 10 --batch-size 128 --data-path D --data-set IMNET --lr 1e-4 "
    "--output_dir save/path --amp --input-size 224 --seed 1 "
    "--pruning_config=pruning_configs/group8_m23_m09.json --prune_per_iter=32 --kl_loss_coeff=100000 "
    "--original_loss_coeff=1.0 --student_eval=True --dist-eval --pruning --prune_dict '{\"Global\":39000}' "
    "--interval_prune 100 --pretrained --distillation-type hard --latency_regularization 5e-4 "
    "--latency_target %s --latency_look_up_table latency_head.json --pruning_exit"
)
FINETUNE = (
    f"{LAUNCH} finetune_dense.py --model {BASE} --epochs 300 --num_workers 10 --batch-size 144 --data-path D "
    "--data-set IMNET --amp --input-size 224 --seed 1 --kl_loss_coeff=100000 --original_loss_coeff=1.0 --dist-eval "
    "--pretrained --finetune P --distillation-type hard --distillation-alpha 0.5 --distillation-tau 20.0 --lr 0.0002"
)
REVIT = (
    f"{LAUNCH} revit_scratch.py --model {BASE} --epochs 300 --num_workers 4 --batch-size 32 --data-path D "
    "--data-set IMNET --output_dir save/path --amp --input-size 224 --seed 1 --kl_loss_coeff=0 "
    "--original_loss_coeff=1.0 --dist-eval --pretrained --distillation-type hard --distillation-alpha 0.5 "
    "--distillation-tau 1.0 --lr 0.0005 --scratch --EMB %s --warmup-epochs 5"
)
SAVIT = (
    "main_savit.py --finetune=C --batch-size=32 --num_workers=16 --data-path=D --model=deit_base_patch16_224 "
    "--pruning_per_iteration=100 --pruning_feed_percent=0.1 --pruning_method=2 --pruning_layers=3 "
    "--pruning_flops_percentage=0.50 --pruning_flops_threshold=0.0001 --need_hessian --finetune_op=2 --epochs=1 "
    "--output_dir=O"
)
DEPLOY = (
    f"{LAUNCH} main_savit_deploy.py --dist-eval --resume= --masked_model=M --teacher-path=T --batch-size=128 "
    "--num_workers=16 --data-path=D --model=deit_base_patch16_224_deploy --pruning_flops_percentage=0 --finetune_op=1 "
    "--epochs=300 --warmup-epochs=0 --cooldown-epochs=0 --output_dir=O"
)
COMMANDS = dict(
    nvit_b=PRUNE % 0.54,
    nvit_h=PRUNE % "0.50",
    nvit_s=PRUNE % 0.39,
    nvit_t=PRUNE % 0.19,
    finetune=FINETUNE,
    finetune_scratch=f"{FINETUNE} --scratch",
    finetune_resume=f"{FINETUNE} --resume --start_epoch 2",
    evaluate="finetune_dense.py --eval --finetune C --data-path D --batch-size 256",
    revit_t=REVIT % 176,
    revit_s=REVIT % 384,
    savit=SAVIT,
    savit_again=f"{SAVIT} --pruning_pickle_from=F",
    savit_finetune=DEPLOY,
    pm_eval="main_pm_vit.py --eval --model tmvit_tiny_patch16_224 --batch-size 256 --data-path D --resume C",
    pm_speed="main_pm_vit.py --speed-only --model tmit_tiny_patch16_224 --batch-size 256",
    pm_prune="main_pm_vit.py --prune --model tmit_tiny_patch16_224 --resume C --data-path D --batch-size 256 "
    "--prune_mode attn --prune_rate 0.1 --keep_rate 0.6 --mixup 0 --reprob 0 --cutmix 0",
    pm_finetune="main_pm_vit.py --model tmit_tiny_patch16_224 --batch-size 256 --data-path D --resume P "
    "--teacher-path T --teacher-model deit_tiny_patch16_224 --distillation-type soft --prune_mode attn "
    "--final_finetune 60 --lr 1e-4 --weight-decay 0.001 --distillation-alpha 0.8 --distillation-tau 20 --output_dir O",
)
# Its script starts again with this line; resume is '' or the checkpoint.
RESUMING = DEPLOY.replace("--resume=", "--resume=$resume").replace("--output_dir=O", "--output_dir=$output_dir")
SAVIT_SCRIPT = f"""
if [ -f "$output_dir/checkpoint.pth" ]; then resume=$output_dir/checkpoint.pth; else resume=; fi
exec "$PYTHON" {RESUMING} "$@"
"""

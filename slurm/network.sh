# NCCL and CUDA settings; each can be set beforehand. Sourced by slurm/launch.sh.

default() { [[ -n ${!1+set} ]] || export "$1=$2"; }

# Say what is wrong, not everything that is done. INFO shows which interfaces and rings NCCL chose: the first thing to look at
# when the preflight's bandwidth is low.
default NCCL_DEBUG WARN
# The network interface of the rendezvous and of NCCL's bootstrap. Chosen by NCCL unless set; set it where nodes have several
# and the first one does not connect them: NCCL_SOCKET_IFNAME=ib0. InfiniBand itself is chosen with NCCL_IB_HCA=mlx5.
# Gloo, which carries what is not on a GPU, takes NCCL's, or else the one that reaches the first node: each rank sets
# GLOO_SOCKET_IFNAME unless it is set.
# A link that flaps for some seconds should not end the job: retry for about 2 minutes (2^22 x 4 us x 7).
default NCCL_IB_TIMEOUT 22
default NCCL_IB_RETRY_CNT 7
# A collective that fails or exceeds trainer.distributed_timeout_minutes ends the process, and leaves the last collectives of
# every rank in files: which rank did not come, and where.
default TORCH_NCCL_ASYNC_ERROR_HANDLING 1
default TORCH_NCCL_DUMP_ON_TIMEOUT 1
default TORCH_FR_BUFFER_SIZE 2000
default TORCH_NCCL_DEBUG_INFO_TEMP_FILE "$KDRL_LOG_DIR/nccl_rank_"
# Memory of finished collectives is free at once, not when a later event says so.
default TORCH_NCCL_AVOID_RECORD_STREAMS 1

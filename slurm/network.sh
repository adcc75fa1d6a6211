# NCCL and CUDA settings; each can be set beforehand. Sourced by slurm/launch.sh.

default() { [[ -n ${!1+set} ]] || export "$1=$2"; }

# Log only problems. INFO also shows which interfaces and rings NCCL chose, the first thing to check if the preflight's bandwidth
# is low.
default NCCL_DEBUG WARN
# The network interface of the rendezvous and of NCCL's bootstrap. NCCL chooses it unless it is set; set it if nodes have
# several and the first one does not connect them: NCCL_SOCKET_IFNAME=ib0. InfiniBand itself is chosen with NCCL_IB_HCA=mlx5.
# Gloo, for tensors that are not on a GPU, uses NCCL's, or else the one that reaches the first node: each rank sets
# GLOO_SOCKET_IFNAME unless it is set.
# A link that flaps for some seconds should not end the job: retry for about 2 minutes (2^22 x 4 us x 7).
default NCCL_IB_TIMEOUT 22
default NCCL_IB_RETRY_CNT 7
# A collective that fails or exceeds trainer.distributed_timeout_minutes ends the process, and every rank's last collectives are
# written to files, which show the rank that is missing, and where.
default TORCH_NCCL_ASYNC_ERROR_HANDLING 1
default TORCH_NCCL_DUMP_ON_TIMEOUT 1
default TORCH_FR_BUFFER_SIZE 2000
default TORCH_NCCL_DEBUG_INFO_TEMP_FILE "$KDRL_LOG_DIR/nccl_rank_"
# Free the memory of finished collectives at once, not at a later event.
default TORCH_NCCL_AVOID_RECORD_STREAMS 1

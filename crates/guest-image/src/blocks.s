# DMA blocks: taking, checking, posting.

# All devices: checks the blocks whose completion was announced, posts as many again, and lets further ones be announced.
vmg_serve_devices:
    push rbx
    push rbp
    mov rbp, [r15 + V_DEVICES]
    mov ebx, DEVS
1:  dec rbp
    js 2f
    lea rdx, [rbx + D_FLOWS]
    call vmg_take_blocks
    lea rdx, [rbx + D_FLOWS + 128]
    call vmg_take_blocks
    call vmg_post
    add rbx, 512
    jmp 1b
2:  pop rbp
    pop rbx
    jmp vmg_acknowledge

# Reports how many blocks were posted to the device that got fewest.
vmg_find_least:
    mov rcx, [r15 + V_DEVICES]
    test rcx, rcx
    jz 9f
    mov edi, DEVS
    mov rax, -1
1:  cmp rax, [rdi + D_POSTED]
    jbe 2f
    mov rax, [rdi + D_POSTED]
2:  add rdi, 512
    dec rcx
    jnz 1b
    mov [r14 + R_LEAST_POSTED], rax
9:  ret

# Device rbx, flow rdx: checks what is between HANDLED and SEEN, at most BLOCKS_PER_TURN.
vmg_take_blocks:
    push r12
    push rbp
    mov r12, rdx
    mov rbp, [r12 + F_SEEN]
    cmp rbp, [r12 + F_ISSUED]
    ja 8f
    mov rax, [r12 + F_HANDLED]
    add rax, BLOCKS_PER_TURN
    cmp rax, rbp
    jae 1f
    mov rbp, rax
    mov qword ptr [r15 + V_WORK], 1   # the rest in the next turn
1:  mov rsi, [r12 + F_HANDLED]
    cmp rsi, rbp
    jae 9f
    mov rdx, rsi
    and edx, 63               # slot
    inc rsi                   # number
    mov [r12 + F_HANDLED], rsi
    mov rcx, [r12 + F_SLOTS]
    mov [rcx + rdx*8], rsi
    inc qword ptr [r14 + R_DMA_BLOCKS]
    mov rax, r12
    sub rax, rbx
    cmp rax, D_FLOWS
    je 2f
    inc qword ptr [r14 + R_P2P_BLOCKS]
2:  call vmg_check_block
    jmp 1b
8:  mov edi, 7
    mov rsi, [rbx + D_INDEX]
    jmp vmg_fail
9:  pop rbp
    pop r12
    ret

# The next slot of all devices and flows.
vmg_check_slot:
    push rbx
    push r12
    mov rcx, [r15 + V_DEVICES]
    test rcx, rcx
    jz 9f
    shl rcx, 7
    mov rax, [r15 + V_SLOT]
    mov rdx, rax
    inc rax
    cmp rax, rcx
    jb 1f
    xor eax, eax
    inc qword ptr [r14 + R_BLOCK_PASSES]
1:  mov [r15 + V_SLOT], rax
    mov rax, rdx
    shr rax, 7                # device
    mov rbx, rax
    shl rbx, 9
    add rbx, DEVS
    mov rax, rdx
    and eax, 64
    lea r12, [rbx + rax*2 + D_FLOWS]
    and edx, 63
    mov rax, [r12 + F_SLOTS]
    mov rsi, [rax + rdx*8]
    test rsi, rsi
    jz 9f                     # empty, or being written
    call vmg_check_block
9:  pop r12
    pop rbx
    ret

# The cookie of block rsi of flow r12, in rax.
vmg_cookie:
    movabs rax, 0xD1B54A32D192ED03
    imul rax, rsi
    xor rax, [r12 + F_SALT]
    ret

# Block number rsi in slot rdx of flow r12 of device rbx. A wrong one is counted and its slot not looked at again.
vmg_check_block:
    inc qword ptr [r14 + R_BLOCKS_CHECKED]
    push rbx
    push rdx
    mov rdi, rdx
    shl rdi, 12
    add rdi, [r12 + F_TARGET]
    movabs rax, 0x4b434f4c42534d56
    mov r10, [rdi]
    cmp r10, rax
    jne 8f
    mov r11, [rdi + 8]
    cmp r11, rsi
    jne 8f
    add r10, r11
    call vmg_cookie
    cmp [rdi + 16], rax
    jne 8f
    add r10, rax
    add rax, [r15 + V_SOURCE_SUM]
    cmp [rdi + 32], rax
    jne 8f
    add r10, rax
    mov rax, r12
    sub rax, rbx
    sub rax, D_FLOWS
    shl rax, 25               # 128 becomes flags 1
    or rax, [r13 + B_BLOCK_LEN]
    cmp [rdi + 24], rax
    jne 8f
    add r10, rax
    mov rax, [rdi + 40]
    test rax, rax
    jnz 7f
    add r10, [rdi + 48]
    mov r11, [rdi + 56]       # the sum of all other words
    mov rcx, [r13 + B_BLOCK_LEN]
    shr rcx, 6
    movabs rbx, 0x9E3779B97F4A7C15
    imul rbx, rsi
    movabs r8, 0x0000000800000008
    mov rdx, r8
1:  dec rcx
    jz 2f
    add rdi, 64
    mov rax, rbx
    xor rax, rdx
    cmp [rdi], rax            # one word of eight is compared, all are in the sum
    jne 8f
    add r10, rax
    add r10, [rdi + 8]
    add r10, [rdi + 16]
    add r10, [rdi + 24]
    add r10, [rdi + 32]
    add r10, [rdi + 40]
    add r10, [rdi + 48]
    add r10, [rdi + 56]
    add rdx, r8
    jmp 1b
2:  cmp r10, r11
    jne 8f
    pop rdx
    pop rbx
    ret
7:  inc qword ptr [r14 + R_INTEGRITY]
8:  inc qword ptr [r14 + R_BLOCKS_LOST]
    pop rdx
    pop rbx
    mov rax, [r12 + F_SLOTS]
    mov qword ptr [rax + rdx*8], 0
    ret

# Device rbx: posts descriptors until enough are in flight, and rings the doorbell.
vmg_post:
    push r12
    push rbp
    mov rbp, [rbx + D_POSTED]
1:  mov rax, rbp
    sub rax, [rbx + D_FLOWS + F_HANDLED]
    sub rax, [rbx + D_FLOWS + 128 + F_HANDLED]
    cmp rax, [r13 + B_IN_FLIGHT]
    jae 5f
    lea r12, [rbx + D_FLOWS]
    xor r11d, r11d            # flags
    cmp qword ptr [r13 + B_P2P], 0
    je 2f
    mov r11, rbp
    and r11d, 1
    mov rax, r11
    shl rax, 7
    add r12, rax
2:  mov rdx, [r12 + F_ISSUED]
    lea rsi, [rdx + 1]
    mov [r12 + F_ISSUED], rsi
    and edx, 63
    mov rax, [r12 + F_SLOTS]
    mov qword ptr [rax + rdx*8], 0
    shl rdx, 12
    add rdx, [r12 + F_TARGET]
    call vmg_cookie
    mov rcx, rbp
    and ecx, RING_SIZE - 1
    mov r8, rcx
    shl r8, 12
    add r8, [rbx + D_MEMORY]
    add r8, 0x40000           # the source block
    mov [r8], rax
    shl rcx, 5
    add rcx, [rbx + D_MEMORY] # the descriptor
    mov [rcx], r8
    mov [rcx + 8], rdx
    shl r11, 32
    or r11, [r13 + B_BLOCK_LEN]
    mov [rcx + 16], r11
    mov [rcx + 24], rax
    inc rbp
    jmp 1b
5:  cmp rbp, [rbx + D_POSTED]
    je 6f
    mov [rbx + D_POSTED], rbp
    mov rax, [rbx + D_MEMORY]
    mov [rax + 0x1000], rbp   # TAIL
    mov rax, [rbx + D_BAR0]
    mov dword ptr [rax + 0x1000], 1
6:  pop rbp
    pop r12
    ret

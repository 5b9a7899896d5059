# The host's clock, and what its progress demands of this turn.

vmg_look_at_clock:
    mov edx, 0xC00
    in eax, dx
    mov ecx, eax
    mov edx, 0xC04
    in eax, dx
    shl rax, 32
    or rax, rcx
    mov qword ptr [r15 + V_CHECKS], CHECKS_LEAST
    mov qword ptr [r15 + V_SLOT_CHECKS], 2
    mov rdx, rax
    mov rcx, [r15 + V_CLOCK]
    mov [r15 + V_CLOCK], rax
    mov [r14 + R_CLOCK], rax
    test rcx, rcx
    jz 9f
    sub rdx, rcx
    cmp qword ptr [r14 + R_REQUEST], 1
    jne 1f
    mov qword ptr [r14 + R_GAP], 0
    mov qword ptr [r14 + R_REQUEST], 0
    jmp 2f
1:  cmp rdx, [r14 + R_GAP]
    jbe 2f
    mov [r14 + R_GAP], rdx
2:  cmp rdx, GAP_COUNTS
    jbe 3f
    mov edx, GAP_COUNTS
3:  add [r15 + V_RUN_CLOCK], rdx
    mov rax, rdx
    shr rax, CHECK_SHIFT
    cmp rax, CHECKS_LEAST
    jb 4f
    mov [r15 + V_CHECKS], rax
4:  mov rax, rdx
    shr rax, SLOT_SHIFT
    add [r15 + V_SLOT_CHECKS], rax
    imul rdx, [r13 + B_RATE]
    add [r15 + V_OWED], rdx
9:  ret

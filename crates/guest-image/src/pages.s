# The writer and the checker of pages.

vmg_start_areas:
    mov rax, [r13 + B_LOW_START]
    mov [r15 + V_WRITE_AT], rax
    mov [r15 + V_CHECK_AT], rax
    mov rcx, [r13 + B_LOW_PAGES]
    mov rdx, rcx
    shl rdx, 12
    add rax, rdx
    mov [r15 + V_WRITE_END], rax
    mov [r15 + V_CHECK_END], rax
    add rcx, [r13 + B_HIGH_PAGES]
    mov [r15 + V_PAGES], rcx
    ret

# The pages owed, at most PAGES_PER_TURN of them.
vmg_write_pages:
    mov rax, [r15 + V_OWED]
    xor edx, edx
    mov ecx, 1000000000
    div rcx
    cmp rax, PAGES_PER_TURN
    jbe 1f
    mov eax, PAGES_PER_TURN   # what is beyond is forgotten: the guest cannot keep the rate
1:  mov [r15 + V_OWED], rdx
    test rax, rax
    jz 9f
    add [r14 + R_PAGES_WRITTEN], rax
    mov r8, rax               # pages to write
    mov rax, [r15 + V_STAMP]
    mov rcx, [r15 + V_WRITE_PAGE]
    mov rdi, [r15 + V_WRITE_AT]
    mov r10, [r15 + V_WRITE_END]
    mov rsi, [r13 + B_STAMPS]
2:  mov rdx, r8               # as many as the area has left
    call vmg_left_in_area
    sub r8, rdx
3:  inc rax
    mov [rsi + rcx*8], rax
    mov [rdi], rax
    mov [rdi + 8], rcx
    mov [rdi + 4088], rax
    inc rcx
    add rdi, 4096
    dec rdx
    jnz 3b
    cmp rdi, r10
    jne 4f
    call vmg_next_area
4:  test r8, r8
    jnz 2b
    mov [r15 + V_STAMP], rax
    mov [r15 + V_WRITE_PAGE], rcx
    mov [r15 + V_WRITE_AT], rdi
    mov [r15 + V_WRITE_END], r10
9:  ret

# The lesser of rdx and the pages between rdi and r10, in rdx.
vmg_left_in_area:
    mov r9, r10
    sub r9, rdi
    shr r9, 12
    cmp rdx, r9
    jbe 1f
    mov rdx, r9
1:  ret

# The end of an area: page rcx, address rdi and end r10 go on in the upper one, or start over in the lower.
vmg_next_area:
    cmp rcx, [r15 + V_PAGES]
    jae 1f
    mov rdi, [r13 + B_HIGH_START]
    mov r10, [r13 + B_HIGH_PAGES]
    jmp 2f
1:  xor ecx, ecx
    mov rdi, [r13 + B_LOW_START]
    mov r10, [r13 + B_LOW_PAGES]
2:  shl r10, 12
    add r10, rdi
    ret

vmg_check_pages:
    mov r8, [r15 + V_CHECKS]  # pages to look at
    mov r11, r8               # of these, compared
    mov rcx, [r15 + V_CHECK_PAGE]
    mov rdi, [r15 + V_CHECK_AT]
    mov r10, [r15 + V_CHECK_END]
    mov rsi, [r13 + B_STAMPS]
1:  mov rdx, r8
    call vmg_left_in_area
    sub r8, rdx
2:  mov rax, [rsi + rcx*8]
    test rax, rax
    jz 5f                     # never written
    cmp [rdi], rax
    jne 6f
    cmp [rdi + 4088], rax
    jne 6f
    cmp [rdi + 8], rcx
    jne 6f
3:  inc rcx
    add rdi, 4096
    dec rdx
    jnz 2b
    cmp rdi, r10
    jne 4f
    call vmg_next_area
    test rcx, rcx
    jnz 4f
    inc qword ptr [r14 + R_PAGE_PASSES]
4:  test r8, r8
    jnz 1b
    mov [r15 + V_CHECK_PAGE], rcx
    mov [r15 + V_CHECK_AT], rdi
    mov [r15 + V_CHECK_END], r10
    add [r14 + R_PAGES_CHECKED], r11
    ret
5:  dec r11
    jmp 3b
6:  inc qword ptr [r14 + R_PAGES_LOST]
    mov qword ptr [rsi + rcx*8], 0     # once is enough
    jmp 3b

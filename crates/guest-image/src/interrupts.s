# Handlers, the search for lost interrupts, giving up.

# A flow whose DONE is ahead of what its handler saw, and stays so for a second of running, has lost its interrupt.
# It is counted and served by hand, so that the guest goes on.
vmg_look_for_lost:
    mov rax, [r15 + V_TICKS_SEEN]
    cmp rax, [r15 + V_NEXT_LOOK]
    jb 9f
    add rax, 8
    mov [r15 + V_NEXT_LOOK], rax
    mov rcx, [r15 + V_DEVICES]
    add rcx, rcx
    mov edi, DEVS + D_FLOWS
    mov rsi, [r15 + V_RUN_CLOCK]
    or rsi, 1
1:  dec rcx
    js 9f
    cli                       # the handler must not run in between
    mov rax, [rdi + F_DONE]
    mov rax, [rax]
    cmp rax, [rdi + F_SEEN]
    jne 3f
    mov qword ptr [rdi + F_WAITING], 0
2:  sti
    test ecx, 1
    jz 5f
    add rdi, 128              # the second flow
    jmp 1b
5:  add rdi, 512 - 128        # the next device's first
    jmp 1b
3:  mov rdx, [rdi + F_WAITING]
    test rdx, rdx
    jnz 4f
    mov [rdi + F_WAITING], rsi
    jmp 2b
4:  sub rdx, rsi
    neg rdx
    cmp rdx, LOST_AFTER
    jb 2b
    inc qword ptr [r14 + R_INTERRUPTS_LOST]
    mov qword ptr [rdi + F_WAITING], 0
    mov [rdi + F_SEEN], rax
    mov rdx, [rdi + F_ACK]
    mov [rdx], rax
    mov qword ptr [r15 + V_WORK], 1
    jmp 2b
9:  ret

# Handlers of the devices' vectors. A device may raise a vector again only once it is acknowledged, which is done at the
# end of a turn (vmg_acknowledge) and not here. Otherwise devices that are faster than the processor raise theirs again and
# again, and of what waits the processor takes the highest vector: those of other devices would wait for ever.
#
# Two stubs of eight bytes per device, then all as one with the vector's index on the stack.
.balign 16
vmg_device_stubs:
.equ vmg_index, 0
.rept DEVICES_MAX * 2
.balign 8
    push vmg_index
    jmp vmg_on_device
.equ vmg_index, vmg_index + 1
.endr
.balign 8
vmg_on_device:
    push rax
    push rcx
    push rdx
    mov eax, [rsp + 24]
    mov ecx, eax
    shr eax, 1
    shl eax, 9
    and ecx, 1
    shl ecx, 7
    lea rcx, [rax + rcx + DEVS + D_FLOWS]
    mov qword ptr [rcx + F_WAITING], 0
    mov qword ptr [rcx + F_HEARD], 1
    mov rdx, [rcx + F_DONE]
    mov rdx, [rdx]
    mov eax, VARS
    mov qword ptr [rax + V_WORK], 1
    mov eax, REPORT
    cmp rdx, [rcx + F_SEEN]
    je 1f
    mov [rcx + F_SEEN], rdx
    inc qword ptr [rax + R_INTERRUPTS]
    jmp 2f
1:  inc qword ptr [rax + R_SPURIOUS]
2:  mov eax, LAPIC + LAPIC_EOI
    mov dword ptr [rax], 0
    pop rdx
    pop rcx
    pop rax
    add rsp, 8
    iretq

# Lets the devices raise again what their handlers heard. First whatever waits is taken, so that no vector waits behind
# one that is raised again.
vmg_acknowledge:
    mov ecx, 0x10000          # what cannot be taken is for the search for lost interrupts to find
    mov rsi, [r15 + V_DEVICES]
    add rsi, 15               # 32 vectors, those of 16 devices, per register, 16 bytes apart
    shr rsi, 4
    mov edx, LAPIC + LAPIC_IRR_DEVICES
1:  dec rsi
    js 2f
3:  cmp dword ptr [rdx], 0
    lea rdx, [rdx + 16]       # leaves the flags
    je 1b
    sub rdx, 16
    dec ecx
    jnz 3b
2:  mov rcx, [r15 + V_DEVICES]
    add rcx, rcx
    mov edi, DEVS + D_FLOWS
3:  dec rcx
    js 9f
    cli                       # the handler must not run in between
    cmp qword ptr [rdi + F_HEARD], 0
    je 4f
    mov qword ptr [rdi + F_HEARD], 0
    mov rax, [rdi + F_SEEN]
    mov rdx, [rdi + F_ACK]
    mov [rdx], rax
4:  sti
    test ecx, 1
    jz 5f
    add rdi, 128              # the second flow
    jmp 3b
5:  add rdi, 512 - 128        # the next device's first
    jmp 3b
9:  ret

vmg_on_timer:
    push rax
    mov eax, VARS
    inc qword ptr [rax + V_TICKS]
    mov eax, LAPIC + LAPIC_EOI
    mov dword ptr [rax], 0
    pop rax
vmg_on_spurious:
    iretq

vmg_on_unexpected:
    mov edi, 0x200
    xor esi, esi
    jmp vmg_fail

# Exceptions: the processor pushes an error code for some.
.balign 16
vmg_exception_stubs:
.equ vmg_index, 0
.rept 32
.balign 16
    mov edi, 0x100 + vmg_index
.if vmg_index == 8 || (vmg_index >= 10 && vmg_index <= 14) || vmg_index == 17 || vmg_index == 21
    mov rsi, [rsp + 8]
.else
    mov rsi, [rsp]
.endif
    jmp vmg_fail_here
.equ vmg_index, vmg_index + 1
.endr
vmg_fail_here:
    jmp vmg_fail

# Gives up with code edi and detail rsi.
vmg_fail:
    cli
    mov r14d, REPORT
    mov eax, edi
    mov [r14 + R_FAILURE], rax
    mov [r14 + R_DETAIL], rsi
    mov dword ptr [r14 + R_STAGE], 0xDEAD
    mov edx, 0xC08
    out dx, eax
1:  hlt
    jmp 1b

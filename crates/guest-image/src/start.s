# Start: interrupt table, timer, PCI, devices; and the end of the image.

# Handler rax for vector edi.
vmg_set_gate:
    mov ecx, edi
    shl ecx, 4
    add ecx, IDT
    mov [rcx], ax
    mov word ptr [rcx + 2], CODE_SELECTOR
    mov word ptr [rcx + 4], 0x8E00    # present, interrupt gate
    shr rax, 16
    mov [rcx + 6], ax
    shr rax, 16
    mov [rcx + 8], rax
    ret

vmg_build_idt:
    push rbx
    mov edi, 255
1:  lea rax, [rip + vmg_on_unexpected]
    call vmg_set_gate
    dec edi
    jns 1b
    mov edi, 31
2:  lea rax, [rip + vmg_exception_stubs]
    mov ecx, edi
    shl ecx, 4
    add rax, rcx
    call vmg_set_gate
    dec edi
    jns 2b
    mov ebx, DEVICES_MAX * 2 - 1
3:  lea rax, [rip + vmg_device_stubs]
    lea rax, [rax + rbx*8]
    lea edi, [rbx + DEVICE_VECTOR]
    call vmg_set_gate
    dec ebx
    jns 3b
    mov edi, TIMER_VECTOR
    lea rax, [rip + vmg_on_timer]
    call vmg_set_gate
    mov edi, SPURIOUS_VECTOR
    lea rax, [rip + vmg_on_spurious]
    call vmg_set_gate
    sub rsp, 16
    mov word ptr [rsp + 6], 256 * 16 - 1
    mov qword ptr [rsp + 8], IDT
    lidt [rsp + 6]
    add rsp, 16
    pop rbx
    ret

vmg_start_timer:
    mov al, 0xFF              # nothing from the PICs
    out 0x21, al
    out 0xA1, al
    mov eax, LAPIC
    mov dword ptr [rax + LAPIC_TPR], 0
    mov dword ptr [rax + LAPIC_SPURIOUS], 0x100 + SPURIOUS_VECTOR
    mov dword ptr [rax + LAPIC_DIVIDE], 0xB   # by 1: KVM's bus runs at 1 GHz
    mov dword ptr [rax + LAPIC_LVT_TIMER], 0x20000 + TIMER_VECTOR
    mov rcx, [r13 + B_TICK_US]
    imul rcx, rcx, 1000
    mov [rax + LAPIC_INITIAL], ecx
    ret

# Config space by mechanism 1: register esi of the function whose address is in edi.
vmg_config_read:
    lea eax, [rdi + rsi]
    mov edx, 0xCF8
    out dx, eax
    mov edx, 0xCFC
    in eax, dx
    ret

# Writes ecx there.
vmg_config_write:
    lea eax, [rdi + rsi]
    mov edx, 0xCF8
    out dx, eax
    mov eax, ecx
    mov edx, 0xCFC
    out dx, eax
    ret

# Steps edi to the next function of bus 0 that may be there: functions 1 to 7 where function 0 says that its slot has several.
# Past the last it is PCI_END.
vmg_next_function:
    test edi, 0x700
    jnz 1f
    mov esi, 0x0C             # the header type is byte 2 of this
    call vmg_config_read
    cmp eax, -1               # nothing is there
    je 2f
    test eax, 0x800000
    jz 2f
1:  add edi, 0x100
    ret
2:  add edi, 0x800
    ret

# Every function of bus 0 that is a sample device, up to DEVICES_MAX.
vmg_find_devices:
    push rbx
    mov edi, 0x80000000
    mov ebx, DEVS
1:  xor esi, esi
    call vmg_config_read
    cmp eax, 0x4d535646
    jne 2f
    mov [rbx + D_CONFIG], rdi
    mov rax, [r15 + V_DEVICES]
    mov [rbx + D_INDEX], rax
    inc rax
    mov [r15 + V_DEVICES], rax
    add rbx, 512
    cmp eax, DEVICES_MAX
    jae 3f
2:  call vmg_next_function
    cmp edi, PCI_END
    jb 1b
3:  pop rbx
    mov rsi, [r15 + V_DEVICES]
    cmp rsi, [r13 + B_DEVICES]
    mov edi, 2
    jne vmg_fail
    ret

vmg_start_devices:
    push rbx
    push rbp
    # The source blocks' pattern, the same in all: word i, from the second on, is i times a constant.
    mov rcx, [r13 + B_BLOCK_LEN]
    shr rcx, 3
    xor eax, eax
    movabs rdx, 0x9E3779B97F4A7C15
    xor r8d, r8d
1:  dec rcx
    jz 2f
    add rax, rdx
    add r8, rax
    jmp 1b
2:  mov [r15 + V_SOURCE_SUM], r8
    mov ebx, DEVS
    mov rbp, [r15 + V_DEVICES]
3:  dec rbp
    js 4f
    call vmg_prepare_device
    add rbx, 512
    jmp 3b
4:  # Where the second flow goes is known once all are prepared.
    mov ebx, DEVS
    mov rbp, [r15 + V_DEVICES]
5:  dec rbp
    js 7f
    mov ecx, DEVS             # the next of the last is the first
    test rbp, rbp
    jz 6f
    lea ecx, [rbx + 512]
6:  mov rax, [rcx + D_MAILBOX]
    mov [rbx + D_FLOWS + 128 + F_TARGET], rax
    call vmg_start_device
    add rbx, 512
    jmp 5b
7:  pop rbp
    pop rbx
    ret

# Device rbx: BARs, memory, pattern, flows.
vmg_prepare_device:
    push rbp
    mov rdi, [rbx + D_CONFIG]
    mov esi, 0x10
    call vmg_config_read
    and eax, 0xFFFFFFF0
    mov [rbx + D_BAR0], rax
    mov esi, 0x18
    call vmg_config_read
    and eax, 0xFFFFFFF0
    mov rbp, rax
    mov esi, 0x1C
    call vmg_config_read
    shl rax, 32
    or rbp, rax
    mov [rbx + D_MAILBOX], rbp
    mov edi, 3
    mov rsi, [rbx + D_INDEX]
    test rbp, rbp
    jz vmg_fail
    cmp qword ptr [rbx + D_BAR0], 0
    je vmg_fail
    mov rdi, [rbx + D_CONFIG]
    mov esi, 4
    call vmg_config_read
    movzx ecx, ax             # writing zeros to the status half changes nothing
    or ecx, 6                 # memory, bus master
    call vmg_config_write

    mov rax, [rbx + D_INDEX]
    mov r9, rax
    shl r9, 8
    shl rax, 20
    add rax, DEVICE_MEMORY
    mov [rbx + D_MEMORY], rax
    lea rcx, [rax + 0x80000]
    mov [rbx + D_FLOWS + F_TARGET], rcx
    lea rcx, [rax + 0x2000]
    mov [rbx + D_FLOWS + F_DONE], rcx
    add rcx, 8
    mov [rbx + D_FLOWS + 128 + F_DONE], rcx
    lea rcx, [rax + 0x3000]
    mov [rbx + D_FLOWS + F_SLOTS], rcx
    add rcx, 0x200
    mov [rbx + D_FLOWS + 128 + F_SLOTS], rcx
    mov [rbx + D_FLOWS + F_SALT], r9
    inc r9
    mov [rbx + D_FLOWS + 128 + F_SALT], r9
    mov rcx, [rbx + D_BAR0]
    add rcx, 0x30
    mov [rbx + D_FLOWS + F_ACK], rcx
    add rcx, 8
    mov [rbx + D_FLOWS + 128 + F_ACK], rcx

    mov ebp, RING_SIZE
    lea rdi, [rax + 0x40000]
    movabs rdx, 0x9E3779B97F4A7C15
1:  mov rcx, [r13 + B_BLOCK_LEN]
    shr rcx, 3
    xor eax, eax
    mov rsi, rdi
2:  dec rcx
    jz 3f
    add rsi, 8
    add rax, rdx
    mov [rsi], rax
    jmp 2b
3:  add rdi, 4096
    dec ebp
    jnz 1b
    pop rbp
    ret

# Device rbx: interrupts, registers, go.
vmg_start_device:
    push rbp
    mov rdi, [rbx + D_CONFIG]
    mov esi, 0x34
    call vmg_config_read
    movzx esi, al
    mov ebp, 48               # a list that never ends is none
1:  and esi, 0xFC
    jz 8f
    dec ebp
    jz 8f
    call vmg_config_read
    cmp al, 0x11
    je 2f
    shr eax, 8
    movzx esi, al
    jmp 1b
2:  mov ebp, esi              # the MSI-X capability
    lea esi, [rbp + 4]
    call vmg_config_read
    mov ecx, eax
    and ecx, 7
    jnz 7f
    mov r8, [rbx + D_BAR0]
    mov r9d, eax
    add r8, r9                # the table
    mov rax, [rbx + D_INDEX]
    lea eax, [rax*2 + DEVICE_VECTOR]
    mov dword ptr [r8], LAPIC
    mov dword ptr [r8 + 4], 0
    mov [r8 + 8], eax
    mov dword ptr [r8 + 12], 0
    inc eax
    mov dword ptr [r8 + 16], LAPIC
    mov dword ptr [r8 + 20], 0
    mov [r8 + 24], eax
    mov dword ptr [r8 + 28], 0
    mov esi, ebp
    call vmg_config_read
    mov ecx, eax
    or ecx, 0x80000000        # enable
    and ecx, 0xBFFFFFFF       # no mask over all
    call vmg_config_write

    mov r8, [rbx + D_BAR0]
    mov esi, [r8]
    mov edi, 6
    cmp esi, 0x4c504d53
    jne vmg_fail
    mov rax, [rbx + D_MEMORY]
    mov [r8 + 0x10], rax
    mov dword ptr [r8 + 0x18], RING_SIZE
    lea rcx, [rax + 0x1000]
    mov [r8 + 0x20], rcx
    lea rcx, [rax + 0x2000]
    mov [r8 + 0x28], rcx
    mov dword ptr [r8 + 8], 1
    mov esi, [r8 + 0xC]
    test esi, 1
    mov edi, 8
    jz vmg_fail
    pop rbp
    ret
7:  mov edi, 5
    mov rsi, [rbx + D_INDEX]
    jmp vmg_fail
8:  mov edi, 4
    mov rsi, [rbx + D_INDEX]
    jmp vmg_fail

# The text at rsi, up to a zero, to the serial line.
vmg_print:
    mov edx, 0x3F8
1:  mov al, [rsi]
    test al, al
    jz 2f
    out dx, al
    inc rsi
    jmp 1b
2:  ret

vmg_text_boot:
    .asciz "guest: up\n"
vmg_text_ready:
    .asciz "guest: driver ready, checking\n"
.balign 16
.globl vfio_migrate_guest_end
vfio_migrate_guest_end:
.text

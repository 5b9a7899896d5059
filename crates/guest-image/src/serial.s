# The serial card: the kernel's sample device mtty (4348:3253). A port of it is a 16550 whose bytes come back to where they
# were written, and it has no interrupt but its pin.
#
# Every so often the bytes of the last burst are read and compared, and another burst is written, which the card announces
# by its pin. In between there are bytes in the card, and move with it.
#
# The card raises its pin at the first byte of a burst, once; while its pin is masked at the host it raises nothing, and
# does not make up for it. So a burst may go without its interrupt; a second of running without any has lost it.

.equ UART_ID, 0x32534348
.equ UART_VECTOR, 0xD0     # past the devices'
.equ UART_BURST, 8        # the card's 16 would read as none
.equ UART_TICKS, 32       # between bursts
.equ UART_IER, 1
.equ UART_IIR, 2
.equ UART_FCR, 2
.equ UART_LCR, 3
.equ UART_MCR, 4
.equ UART_LSR, 5

# The first such card on bus 0, if there is one: its pin to the first processor, its first port looped back.
vmg_start_uart:
    push rbx
    mov edi, 0x80000000
1:  xor esi, esi
    call vmg_config_read
    cmp eax, UART_ID
    je 2f
    call vmg_next_function
    cmp edi, PCI_END
    jb 1b
    pop rbx
    ret
2:  mov esi, 0x10
    call vmg_config_read
    and eax, 0xFFFC
    mov ebx, eax
    mov esi, 0x3C
    call vmg_config_read
    movzx ecx, al             # the IOAPIC's pin
    test ebx, ebx
    jz 8f
    cmp ecx, IOAPIC_PINS
    jae 8f
    mov eax, IOAPIC
    lea edx, [rcx*2 + 0x11]
    mov [rax], edx
    mov dword ptr [rax + IOAPIC_DATA], 0
    dec edx
    mov [rax], edx
    mov dword ptr [rax + IOAPIC_DATA], 0x8000 + UART_VECTOR   # level, not masked
    mov esi, 4
    call vmg_config_read
    movzx ecx, ax
    or ecx, 1                 # ports
    call vmg_config_write
    mov edi, UART_VECTOR
    lea rax, [rip + vmg_on_uart]
    call vmg_set_gate
    lea edx, [rbx + UART_LCR]
    mov al, 3                 # eight bits; the divisor put away
    out dx, al
    lea edx, [rbx + UART_MCR]
    mov al, 0x10              # loop back
    out dx, al
    lea edx, [rbx + UART_FCR]
    mov al, 7                 # FIFOs on, and empty
    out dx, al
    mov [r15 + V_UART], rbx
    pop rbx
    ret
8:  mov edi, 9
    mov esi, ebx
    jmp vmg_fail

vmg_serve_uart:
    cmp qword ptr [r15 + V_UART], 0
    je 9f
    mov rax, [r15 + V_TICKS_SEEN]
    cmp rax, [r15 + V_UART_NEXT]
    jb 9f
    add rax, UART_TICKS
    mov [r15 + V_UART_NEXT], rax
    mov r9, [r15 + V_UART]
    lea r10d, [r9 + UART_LSR]
    mov rcx, [r15 + V_UART_OUT]
    mov r8, [r15 + V_RUN_CLOCK]
    cmp qword ptr [r15 + V_UART_HEARD], 0
    jne 1f
    test rcx, rcx             # nothing was written yet
    jz 1f
    mov rax, r8
    sub rax, [r15 + V_UART_SINCE]
    cmp rax, LOST_AFTER
    jb 3f
    inc qword ptr [r14 + R_UART_INTERRUPTS_LOST]
1:  mov [r15 + V_UART_SINCE], r8
    mov qword ptr [r15 + V_UART_HEARD], 0
3:  mov rsi, [r15 + V_UART_IN]
    cmp rsi, rcx
    jae 5f
    mov edx, r10d
    in al, dx
    test al, 1
    jz 4f
    mov edx, r9d
    in al, dx
    inc qword ptr [r15 + V_UART_IN]
    inc qword ptr [r14 + R_UART_BYTES]
    cmp al, sil
    je 3b
    inc qword ptr [r14 + R_UART_BYTES_LOST]
    jmp 3b
4:  mov [r15 + V_UART_IN], rcx
    sub rcx, rsi              # these never came
    add [r14 + R_UART_BYTES_LOST], rcx
5:  mov edx, r10d
    in al, dx
    test al, 1
    jz 6f
    inc qword ptr [r14 + R_UART_BYTES_LOST]   # one that nobody wrote
    lea edx, [r9 + UART_FCR]
    mov al, 7
    out dx, al
6:  lea edx, [r9 + UART_IER]
    mov al, 1                 # tell of bytes to read
    out dx, al
    mov ecx, UART_BURST
    mov edx, r9d
7:  mov rax, [r15 + V_UART_OUT]
    inc qword ptr [r15 + V_UART_OUT]
    out dx, al
    dec ecx
    jnz 7b
9:  ret

# Its pin. What raised it is turned off at the card first: a pin that is still up when the interrupt is ended is raised anew.
vmg_on_uart:
    push rax
    push rcx
    push rdx
    mov ecx, VARS
    mov edx, [rcx + V_UART]
    add edx, UART_IIR
    in al, dx
    test al, 1
    jnz 1f
    dec edx                   # UART_IER
    xor eax, eax
    out dx, al
    mov qword ptr [rcx + V_UART_HEARD], 1
    mov eax, REPORT
    inc qword ptr [rax + R_UART_INTERRUPTS]
    jmp 2f
1:  mov eax, REPORT
    inc qword ptr [rax + R_SPURIOUS]
2:  mov eax, LAPIC + LAPIC_EOI
    mov dword ptr [rax], 0
    pop rdx
    pop rcx
    pop rax
    iretq

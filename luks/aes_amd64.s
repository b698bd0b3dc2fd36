//go:build !purego

#include "textflag.h"

// Registers of all functions: AX round keys, BX rounds, DI dst, SI src, CX count; R8 and R9 walk over the round keys.

// x^128 = x^7 + x^2 + x + 1: what doubling a tweak carries from bit 127 to 0 (low word) and from bit 63 to 64.
DATA carry<>+0(SB)/8, $0x87
DATA carry<>+8(SB)/8, $1
GLOBL carry<>(SB), RODATA, $16

#define EACH8(OP, KEY) \
	OP KEY, X0 \
	OP KEY, X1 \
	OP KEY, X2 \
	OP KEY, X3 \
	OP KEY, X4 \
	OP KEY, X5 \
	OP KEY, X6 \
	OP KEY, X7

// ROUNDS8 does all rounds but the whitening on X0-X7. AESENC needs aligned memory, so keys come by register.
#define ROUNDS8(OP, LAST, LOOP) \
	LEAQ 16(AX), R8       \
	LEAQ -1(BX), R9       \
LOOP:                     \
	MOVOU (R8), X10       \
	ADDQ $16, R8          \
	EACH8(OP, X10)        \
	DECQ R9               \
	JNZ  LOOP             \
	MOVOU (R8), X10       \
	EACH8(LAST, X10)

#define ROUNDS1(OP, LAST, LOOP) \
	LEAQ 16(AX), R8       \
	LEAQ -1(BX), R9       \
LOOP:                     \
	MOVOU (R8), X10       \
	ADDQ $16, R8          \
	OP   X10, X0          \
	DECQ R9               \
	JNZ  LOOP             \
	MOVOU (R8), X10       \
	LAST X10, X0

#define LOAD8 \
	MOVOU (SI), X0    \
	MOVOU 16(SI), X1  \
	MOVOU 32(SI), X2  \
	MOVOU 48(SI), X3  \
	MOVOU 64(SI), X4  \
	MOVOU 80(SI), X5  \
	MOVOU 96(SI), X6  \
	MOVOU 112(SI), X7

#define STORE8 \
	MOVOU X0, (DI)    \
	MOVOU X1, 16(DI)  \
	MOVOU X2, 32(DI)  \
	MOVOU X3, 48(DI)  \
	MOVOU X4, 64(DI)  \
	MOVOU X5, 80(DI)  \
	MOVOU X6, 96(DI)  \
	MOVOU X7, 112(DI)

#define BLOCKS(OP, LAST) \
	SUBQ $8, CX           \
	JLT  rest             \
eight:                    \
	LOAD8                 \
	MOVOU (AX), X10       \
	EACH8(PXOR, X10)      \
	ROUNDS8(OP, LAST, rounds8) \
	STORE8                \
	ADDQ $128, SI         \
	ADDQ $128, DI         \
	SUBQ $8, CX           \
	JGE  eight            \
rest:                     \
	ADDQ $8, CX           \
	JZ   done             \
one:                      \
	MOVOU (SI), X0        \
	MOVOU (AX), X10       \
	PXOR X10, X0          \
	ROUNDS1(OP, LAST, rounds1) \
	MOVOU X0, (DI)        \
	ADDQ $16, SI          \
	ADDQ $16, DI          \
	DECQ CX               \
	JNZ  one              \
done:                     \
	RET

// func encryptAES(rounds int, keys, dst, src *byte, n int)
TEXT ·encryptAES(SB), NOSPLIT, $0-40
	MOVQ rounds+0(FP), BX
	MOVQ keys+8(FP), AX
	MOVQ dst+16(FP), DI
	MOVQ src+24(FP), SI
	MOVQ n+32(FP), CX
	BLOCKS(AESENC, AESENCLAST)

// func decryptAES(rounds int, keys, dst, src *byte, n int)
TEXT ·decryptAES(SB), NOSPLIT, $0-40
	MOVQ rounds+0(FP), BX
	MOVQ keys+8(FP), AX
	MOVQ dst+16(FP), DI
	MOVQ src+24(FP), SI
	MOVQ n+32(FP), CX
	BLOCKS(AESDEC, AESDECLAST)

// TWEAKED loads block I, whitens it with key X10 and the tweak in X8, keeps the tweak, and doubles X8 for the next block.
// X15 is carry.
#define TWEAKED(I, X) \
	MOVOU  (I*16)(SI), X \
	MOVOU  X8, (I*16)(SP) \
	PXOR   X10, X        \
	PXOR   X8, X         \
	PSHUFL $0x13, X8, X9 \
	PADDQ  X8, X8        \
	PSRAL  $31, X9       \
	PAND   X15, X9       \
	PXOR   X9, X8

// UNTWEAKED takes the kept tweak off block I and stores it.
#define UNTWEAKED(I, X) \
	MOVOU (I*16)(SP), X9 \
	PXOR  X9, X          \
	MOVOU X, (I*16)(DI)

// XTS handles the four groups of eight blocks of each sector. DX walks over the tweaks, R10 counts the groups.
#define XTS(OP, LAST) \
	MOVOU carry<>(SB), X15 \
sector:                   \
	MOVOU (DX), X8        \
	ADDQ $16, DX          \
	MOVQ $4, R10          \
eight:                    \
	MOVOU (AX), X10       \
	TWEAKED(0, X0)        \
	TWEAKED(1, X1)        \
	TWEAKED(2, X2)        \
	TWEAKED(3, X3)        \
	TWEAKED(4, X4)        \
	TWEAKED(5, X5)        \
	TWEAKED(6, X6)        \
	TWEAKED(7, X7)        \
	ROUNDS8(OP, LAST, rounds8) \
	UNTWEAKED(0, X0)      \
	UNTWEAKED(1, X1)      \
	UNTWEAKED(2, X2)      \
	UNTWEAKED(3, X3)      \
	UNTWEAKED(4, X4)      \
	UNTWEAKED(5, X5)      \
	UNTWEAKED(6, X6)      \
	UNTWEAKED(7, X7)      \
	ADDQ $128, SI         \
	ADDQ $128, DI         \
	DECQ R10              \
	JNZ  eight            \
	DECQ CX               \
	JNZ  sector           \
	RET

// func encryptXTSAES(rounds int, keys, dst, src, tweaks *byte, n int)
TEXT ·encryptXTSAES(SB), NOSPLIT, $128-48
	MOVQ rounds+0(FP), BX
	MOVQ keys+8(FP), AX
	MOVQ dst+16(FP), DI
	MOVQ src+24(FP), SI
	MOVQ tweaks+32(FP), DX
	MOVQ n+40(FP), CX
	XTS(AESENC, AESENCLAST)

// func decryptXTSAES(rounds int, keys, dst, src, tweaks *byte, n int)
TEXT ·decryptXTSAES(SB), NOSPLIT, $128-48
	MOVQ rounds+0(FP), BX
	MOVQ keys+8(FP), AX
	MOVQ dst+16(FP), DI
	MOVQ src+24(FP), SI
	MOVQ tweaks+32(FP), DX
	MOVQ n+40(FP), CX
	XTS(AESDEC, AESDECLAST)

// VAES: each Z register holds four blocks.

#define VROUNDS1(OP, LAST, LOOP) \
	LEAQ 16(AX), R8       \
	LEAQ -1(BX), R9       \
LOOP:                     \
	VBROADCASTI32X4 (R8), Z16 \
	ADDQ $16, R8          \
	OP   Z16, Z0, Z0      \
	DECQ R9               \
	JNZ  LOOP             \
	VBROADCASTI32X4 (R8), Z16 \
	LAST Z16, Z0, Z0

#define VEACH8(OP) \
	OP Z16, Z0, Z0 \
	OP Z16, Z1, Z1 \
	OP Z16, Z2, Z2 \
	OP Z16, Z3, Z3 \
	OP Z16, Z4, Z4 \
	OP Z16, Z5, Z5 \
	OP Z16, Z6, Z6 \
	OP Z16, Z7, Z7

#define VROUNDS8(OP, LAST, LOOP) \
	LEAQ 16(AX), R8       \
	LEAQ -1(BX), R9       \
LOOP:                     \
	VBROADCASTI32X4 (R8), Z16 \
	ADDQ $16, R8          \
	VEACH8(OP)            \
	DECQ R9               \
	JNZ  LOOP             \
	VBROADCASTI32X4 (R8), Z16 \
	VEACH8(LAST)

#define VLOAD8 \
	VMOVDQU64 (SI), Z0    \
	VMOVDQU64 64(SI), Z1  \
	VMOVDQU64 128(SI), Z2 \
	VMOVDQU64 192(SI), Z3 \
	VMOVDQU64 256(SI), Z4 \
	VMOVDQU64 320(SI), Z5 \
	VMOVDQU64 384(SI), Z6 \
	VMOVDQU64 448(SI), Z7

#define VSTORE8 \
	VMOVDQU64 Z0, (DI)    \
	VMOVDQU64 Z1, 64(DI)  \
	VMOVDQU64 Z2, 128(DI) \
	VMOVDQU64 Z3, 192(DI) \
	VMOVDQU64 Z4, 256(DI) \
	VMOVDQU64 Z5, 320(DI) \
	VMOVDQU64 Z6, 384(DI) \
	VMOVDQU64 Z7, 448(DI)

#define VBLOCKS(OP, LAST) \
	SUBQ $8, CX           \
	JLT  rest             \
eight:                    \
	VLOAD8                \
	VBROADCASTI32X4 (AX), Z16 \
	VEACH8(VPXORQ)        \
	VROUNDS8(OP, LAST, rounds8) \
	VSTORE8               \
	ADDQ $512, SI         \
	ADDQ $512, DI         \
	SUBQ $8, CX           \
	JGE  eight            \
rest:                     \
	ADDQ $8, CX           \
	JZ   done             \
one:                      \
	VMOVDQU64 (SI), Z0    \
	VBROADCASTI32X4 (AX), Z16 \
	VPXORQ Z16, Z0, Z0    \
	VROUNDS1(OP, LAST, rounds1) \
	VMOVDQU64 Z0, (DI)    \
	ADDQ $64, SI          \
	ADDQ $64, DI          \
	DECQ CX               \
	JNZ  one              \
done:                     \
	VZEROUPPER            \
	RET

// func encryptVAES(rounds int, keys, dst, src *byte, n int)
TEXT ·encryptVAES(SB), NOSPLIT, $0-40
	MOVQ rounds+0(FP), BX
	MOVQ keys+8(FP), AX
	MOVQ dst+16(FP), DI
	MOVQ src+24(FP), SI
	MOVQ n+32(FP), CX
	VBLOCKS(VAESENC, VAESENCLAST)

// func decryptVAES(rounds int, keys, dst, src *byte, n int)
TEXT ·decryptVAES(SB), NOSPLIT, $0-40
	MOVQ rounds+0(FP), BX
	MOVQ keys+8(FP), AX
	MOVQ dst+16(FP), DI
	MOVQ src+24(FP), SI
	MOVQ n+32(FP), CX
	VBLOCKS(VAESDEC, VAESDECLAST)

// By how many bits to shift a tweak in each of the four lanes, and by how many what that carries from one word to the
// other: a shift by 64 leaves nothing.
DATA left<>+0(SB)/8, $0
DATA left<>+8(SB)/8, $0
DATA left<>+16(SB)/8, $1
DATA left<>+24(SB)/8, $1
DATA left<>+32(SB)/8, $2
DATA left<>+40(SB)/8, $2
DATA left<>+48(SB)/8, $3
DATA left<>+56(SB)/8, $3
GLOBL left<>(SB), RODATA, $64

DATA right<>+0(SB)/8, $64
DATA right<>+8(SB)/8, $64
DATA right<>+16(SB)/8, $63
DATA right<>+24(SB)/8, $63
DATA right<>+32(SB)/8, $62
DATA right<>+40(SB)/8, $62
DATA right<>+48(SB)/8, $61
DATA right<>+56(SB)/8, $61
GLOBL right<>(SB), RODATA, $64

// TIMES256 sets NEXT to the four tweaks in T times x^8: a shift by one byte, and the byte that falls out comes back
// times x^7 + x^2 + x + 1 (Z28).
#define TIMES256(T, NEXT) \
	VPSRLDQ    $15, T, Z17       \
	VPSLLDQ    $1, T, NEXT       \
	VPCLMULQDQ $0, Z28, Z17, Z17 \
	VPXORQ     Z17, NEXT, NEXT

// VTWEAKED loads four blocks and whitens them with key Z16 and their tweaks.
#define VTWEAKED(OFF, T, Z) \
	VMOVDQU64  OFF(SI), Z \
	VPTERNLOGQ $0x96, T, Z16, Z

#define VUNTWEAKED(OFF, T, Z) \
	VPXORQ    T, Z, Z \
	VMOVDQU64 Z, OFF(DI)

// VXTS handles a sector at a time: blocks in Z0-Z7, their tweaks in Z8-Z15. For the first two registers of tweaks, the
// sector's tweak is shifted by a number of bits of its own in each lane; the words that the bits fall out of are swapped,
// so that those from the low word land in the high one, and those from the high one are multiplied.
#define VXTS(OP, LAST) \
	VMOVDQU64 left<>(SB), Z30 \
	VMOVDQU64 right<>(SB), Z29 \
	VBROADCASTI32X4 carry<>(SB), Z28 \
	MOVQ $0xAA, R10       \
	KMOVQ R10, K1         \
sector:                   \
	VBROADCASTI32X4 (DX), Z18 \
	ADDQ $16, DX          \
	VPSLLVQ Z30, Z18, Z8  \
	VPSRLVQ Z29, Z18, Z17 \
	VPSHUFD $0x4E, Z17, Z17 \
	VPXORQ  Z17, Z8, K1, Z8 \
	VPCLMULQDQ $0, Z28, Z17, Z17 \
	VPXORQ  Z17, Z8, Z8   \
	VPSLLQ  $4, Z8, Z9    \
	VPSRLQ  $60, Z8, Z17  \
	VPSHUFD $0x4E, Z17, Z17 \
	VPXORQ  Z17, Z9, K1, Z9 \
	VPCLMULQDQ $0, Z28, Z17, Z17 \
	VPXORQ  Z17, Z9, Z9   \
	TIMES256(Z8, Z10)     \
	TIMES256(Z9, Z11)     \
	TIMES256(Z10, Z12)    \
	TIMES256(Z11, Z13)    \
	TIMES256(Z12, Z14)    \
	TIMES256(Z13, Z15)    \
	VBROADCASTI32X4 (AX), Z16 \
	VTWEAKED(0, Z8, Z0)   \
	VTWEAKED(64, Z9, Z1)  \
	VTWEAKED(128, Z10, Z2) \
	VTWEAKED(192, Z11, Z3) \
	VTWEAKED(256, Z12, Z4) \
	VTWEAKED(320, Z13, Z5) \
	VTWEAKED(384, Z14, Z6) \
	VTWEAKED(448, Z15, Z7) \
	VROUNDS8(OP, LAST, rounds8) \
	VUNTWEAKED(0, Z8, Z0) \
	VUNTWEAKED(64, Z9, Z1) \
	VUNTWEAKED(128, Z10, Z2) \
	VUNTWEAKED(192, Z11, Z3) \
	VUNTWEAKED(256, Z12, Z4) \
	VUNTWEAKED(320, Z13, Z5) \
	VUNTWEAKED(384, Z14, Z6) \
	VUNTWEAKED(448, Z15, Z7) \
	ADDQ $512, SI         \
	ADDQ $512, DI         \
	DECQ CX               \
	JNZ  sector           \
	VZEROUPPER            \
	RET

// func encryptXTSVAES(rounds int, keys, dst, src, tweaks *byte, n int)
TEXT ·encryptXTSVAES(SB), NOSPLIT, $0-48
	MOVQ rounds+0(FP), BX
	MOVQ keys+8(FP), AX
	MOVQ dst+16(FP), DI
	MOVQ src+24(FP), SI
	MOVQ tweaks+32(FP), DX
	MOVQ n+40(FP), CX
	VXTS(VAESENC, VAESENCLAST)

// func decryptXTSVAES(rounds int, keys, dst, src, tweaks *byte, n int)
TEXT ·decryptXTSVAES(SB), NOSPLIT, $0-48
	MOVQ rounds+0(FP), BX
	MOVQ keys+8(FP), AX
	MOVQ dst+16(FP), DI
	MOVQ src+24(FP), SI
	MOVQ tweaks+32(FP), DX
	MOVQ n+40(FP), CX
	VXTS(VAESDEC, VAESDECLAST)

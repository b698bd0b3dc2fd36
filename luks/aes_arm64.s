//go:build !purego

#include "textflag.h"

// Registers of all functions: R0 count, R1 rounds, R2 round keys, R3 dst, R4 src. Blocks are in V0-V7. The round keys end
// in V30, wherever they begin: V16 for 14 rounds, V18 for 12, V20 for 10.

#define KEYS(TWELVE, TEN) \
	CMP    $12, R1                                     \
	BLT    TEN                                         \
	BEQ    TWELVE                                      \
	VLD1.P 32(R2), [V16.B16, V17.B16]                  \
TWELVE:                                                \
	VLD1.P 32(R2), [V18.B16, V19.B16]                  \
TEN:                                                   \
	VLD1.P 64(R2), [V20.B16, V21.B16, V22.B16, V23.B16] \
	VLD1.P 64(R2), [V24.B16, V25.B16, V26.B16, V27.B16] \
	VLD1   (R2), [V28.B16, V29.B16, V30.B16]

#define ROUND1(KEY, OP, MIX) \
	OP  KEY.B16, V0.B16 \
	MIX V0.B16, V0.B16

#define ROUNDS1(OP, MIX, TWELVE, TEN) \
	CMP $12, R1            \
	BLT TEN                \
	BEQ TWELVE             \
	ROUND1(V16, OP, MIX)   \
	ROUND1(V17, OP, MIX)   \
TWELVE:                    \
	ROUND1(V18, OP, MIX)   \
	ROUND1(V19, OP, MIX)   \
TEN:                       \
	ROUND1(V20, OP, MIX)   \
	ROUND1(V21, OP, MIX)   \
	ROUND1(V22, OP, MIX)   \
	ROUND1(V23, OP, MIX)   \
	ROUND1(V24, OP, MIX)   \
	ROUND1(V25, OP, MIX)   \
	ROUND1(V26, OP, MIX)   \
	ROUND1(V27, OP, MIX)   \
	ROUND1(V28, OP, MIX)   \
	OP   V29.B16, V0.B16   \
	VEOR V30.B16, V0.B16, V0.B16

#define ROUND8(KEY, OP, MIX) \
	OP  KEY.B16, V0.B16 \
	MIX V0.B16, V0.B16  \
	OP  KEY.B16, V1.B16 \
	MIX V1.B16, V1.B16  \
	OP  KEY.B16, V2.B16 \
	MIX V2.B16, V2.B16  \
	OP  KEY.B16, V3.B16 \
	MIX V3.B16, V3.B16  \
	OP  KEY.B16, V4.B16 \
	MIX V4.B16, V4.B16  \
	OP  KEY.B16, V5.B16 \
	MIX V5.B16, V5.B16  \
	OP  KEY.B16, V6.B16 \
	MIX V6.B16, V6.B16  \
	OP  KEY.B16, V7.B16 \
	MIX V7.B16, V7.B16

#define LAST8(OP) \
	OP   V29.B16, V0.B16 \
	OP   V29.B16, V1.B16 \
	OP   V29.B16, V2.B16 \
	OP   V29.B16, V3.B16 \
	OP   V29.B16, V4.B16 \
	OP   V29.B16, V5.B16 \
	OP   V29.B16, V6.B16 \
	OP   V29.B16, V7.B16 \
	VEOR V30.B16, V0.B16, V0.B16 \
	VEOR V30.B16, V1.B16, V1.B16 \
	VEOR V30.B16, V2.B16, V2.B16 \
	VEOR V30.B16, V3.B16, V3.B16 \
	VEOR V30.B16, V4.B16, V4.B16 \
	VEOR V30.B16, V5.B16, V5.B16 \
	VEOR V30.B16, V6.B16, V6.B16 \
	VEOR V30.B16, V7.B16, V7.B16

#define ROUNDS8(OP, MIX, TWELVE, TEN) \
	CMP $12, R1            \
	BLT TEN                \
	BEQ TWELVE             \
	ROUND8(V16, OP, MIX)   \
	ROUND8(V17, OP, MIX)   \
TWELVE:                    \
	ROUND8(V18, OP, MIX)   \
	ROUND8(V19, OP, MIX)   \
TEN:                       \
	ROUND8(V20, OP, MIX)   \
	ROUND8(V21, OP, MIX)   \
	ROUND8(V22, OP, MIX)   \
	ROUND8(V23, OP, MIX)   \
	ROUND8(V24, OP, MIX)   \
	ROUND8(V25, OP, MIX)   \
	ROUND8(V26, OP, MIX)   \
	ROUND8(V27, OP, MIX)   \
	ROUND8(V28, OP, MIX)   \
	LAST8(OP)

#define BLOCKS(OP, MIX) \
	KEYS(keys12, keys10)   \
	SUBS $8, R0            \
	BLT  rest              \
eight:                     \
	VLD1.P 64(R4), [V0.B16, V1.B16, V2.B16, V3.B16] \
	VLD1.P 64(R4), [V4.B16, V5.B16, V6.B16, V7.B16] \
	ROUNDS8(OP, MIX, eight12, eight10) \
	VST1.P [V0.B16, V1.B16, V2.B16, V3.B16], 64(R3) \
	VST1.P [V4.B16, V5.B16, V6.B16, V7.B16], 64(R3) \
	SUBS $8, R0            \
	BGE  eight             \
rest:                      \
	ADDS $8, R0            \
	BEQ  done              \
one:                       \
	VLD1.P 16(R4), [V0.B16] \
	ROUNDS1(OP, MIX, one12, one10) \
	VST1.P [V0.B16], 16(R3) \
	SUBS $1, R0            \
	BNE  one               \
done:                      \
	RET

// func encryptAES(rounds int, keys, dst, src *byte, n int)
TEXT ·encryptAES(SB), NOSPLIT, $0-40
	MOVD rounds+0(FP), R1
	MOVD keys+8(FP), R2
	MOVD dst+16(FP), R3
	MOVD src+24(FP), R4
	MOVD n+32(FP), R0
	BLOCKS(AESE, AESMC)

// func decryptAES(rounds int, keys, dst, src *byte, n int)
TEXT ·decryptAES(SB), NOSPLIT, $0-40
	MOVD rounds+0(FP), R1
	MOVD keys+8(FP), R2
	MOVD dst+16(FP), R3
	MOVD src+24(FP), R4
	MOVD n+32(FP), R0
	BLOCKS(AESD, AESIMC)

// TWEAK moves the tweak in R6 and R7 to V and doubles it: what falls out of bit 127 comes back times x^7 + x^2 + x + 1 (R9).
#define TWEAK(V) \
	VMOV R6, V.D[0]       \
	VMOV R7, V.D[1]       \
	ASR  $63, R7, R8      \
	AND  R9, R8, R8       \
	EXTR $63, R6, R7, R7  \
	EOR  R6<<1, R8, R6

#define WHITEN \
	VEOR V8.B16, V0.B16, V0.B16  \
	VEOR V9.B16, V1.B16, V1.B16  \
	VEOR V10.B16, V2.B16, V2.B16 \
	VEOR V11.B16, V3.B16, V3.B16 \
	VEOR V12.B16, V4.B16, V4.B16 \
	VEOR V13.B16, V5.B16, V5.B16 \
	VEOR V14.B16, V6.B16, V6.B16 \
	VEOR V15.B16, V7.B16, V7.B16

// XTS handles the four groups of eight blocks of each sector. R5 walks over the tweaks, R10 counts the groups.
#define XTS(OP, MIX) \
	KEYS(keys12, keys10)   \
	MOVD $0x87, R9         \
sector:                    \
	LDP.P 16(R5), (R6, R7) \
	MOVD $4, R10           \
eight:                     \
	TWEAK(V8)              \
	TWEAK(V9)              \
	TWEAK(V10)             \
	TWEAK(V11)             \
	TWEAK(V12)             \
	TWEAK(V13)             \
	TWEAK(V14)             \
	TWEAK(V15)             \
	VLD1.P 64(R4), [V0.B16, V1.B16, V2.B16, V3.B16] \
	VLD1.P 64(R4), [V4.B16, V5.B16, V6.B16, V7.B16] \
	WHITEN                 \
	ROUNDS8(OP, MIX, eight12, eight10) \
	WHITEN                 \
	VST1.P [V0.B16, V1.B16, V2.B16, V3.B16], 64(R3) \
	VST1.P [V4.B16, V5.B16, V6.B16, V7.B16], 64(R3) \
	SUBS $1, R10           \
	BNE  eight             \
	SUBS $1, R0            \
	BNE  sector            \
	RET

// func encryptXTSAES(rounds int, keys, dst, src, tweaks *byte, n int)
TEXT ·encryptXTSAES(SB), NOSPLIT, $0-48
	MOVD rounds+0(FP), R1
	MOVD keys+8(FP), R2
	MOVD dst+16(FP), R3
	MOVD src+24(FP), R4
	MOVD tweaks+32(FP), R5
	MOVD n+40(FP), R0
	XTS(AESE, AESMC)

// func decryptXTSAES(rounds int, keys, dst, src, tweaks *byte, n int)
TEXT ·decryptXTSAES(SB), NOSPLIT, $0-48
	MOVD rounds+0(FP), R1
	MOVD keys+8(FP), R2
	MOVD dst+16(FP), R3
	MOVD src+24(FP), R4
	MOVD tweaks+32(FP), R5
	MOVD n+40(FP), R0
	XTS(AESD, AESIMC)

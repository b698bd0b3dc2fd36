package scsi

import "encoding/binary"

// Status is a SCSI status byte (SAM-5).
type Status uint8

// The statuses that a Unit returns.
const (
	Good           Status = 0x00
	CheckCondition Status = 0x02
	Busy           Status = 0x08
	TaskSetFull    Status = 0x28
)

// Sense keys (SPC-4, table 56).
const (
	keyNotReady       = 0x2
	keyMediumError    = 0x3
	keyHardwareError  = 0x4
	keyIllegalRequest = 0x5
	keyUnitAttention  = 0x6
	keyDataProtect    = 0x7
	keyCopyAborted    = 0xA
	keyMiscompare     = 0xE
)

// code is an additional sense code and its qualifier.
type code uint16

// The additional sense codes that a Unit returns.
const (
	codeFormatInProgress     code = 0x0404
	codeSanitizeInProgress   code = 0x041B
	codeStandby              code = 0x040B
	codeUnavailable          code = 0x040C
	codeWriteError           code = 0x0C00
	codeReadError            code = 0x1100
	codeListLength           code = 0x1A00
	codeMiscompare           code = 0x1D00
	codeInvalidOpcode        code = 0x2000
	codeLBAOutOfRange        code = 0x2100
	codeInvalidField         code = 0x2400
	codeInvalidParameter     code = 0x2600
	codeTooManyTargets       code = 0x2606
	codeUnknownTargetType    code = 0x2607
	codeTooManySegments      code = 0x2608
	codeUnknownSegmentType   code = 0x2609
	codeWriteProtected       code = 0x2700
	codeSpaceExhausted       code = 0x2707
	codePowerOn              code = 0x2900
	codeCapacityChanged      code = 0x2A09
	codeFormatFailed         code = 0x3101
	codeSanitizeFailed       code = 0x3103
	codeSavingNotSupported   code = 0x3900
	codeInternalFailure      code = 0x4400
	codeUnreachableCopyPeer  code = 0x0804
	codeIncorrectCopyTarget  code = 0x0D03
	codeThirdPartyDeviceFail code = 0x0D01
)

// senseError is a command's failure as sense data says it. It is an error inside this package only.
type senseError struct {
	key  uint8
	code code
	// info is the INFORMATION field, if hasInfo: the first LBA, or byte of a parameter, that is concerned.
	info    uint64
	hasInfo bool
	// field points to the first wrong byte of the command (inCommand) or of the parameter list, if hasField.
	field               uint16
	bit                 int8 // of that byte, or negative
	hasField, inCommand bool
}

func (e *senseError) Error() string { return "sense data" }

func illegal(c code) *senseError { return &senseError{key: keyIllegalRequest, code: c} }

// badField says which byte of the command is wrong; bit is the highest wrong one of it, or -1.
func badField(at int, bit int8) *senseError {
	return &senseError{key: keyIllegalRequest, code: codeInvalidField, field: uint16(at), bit: bit, hasField: true, inCommand: true}
}

// badParameter says which byte of the parameter list is wrong.
func badParameter(at int) *senseError {
	return &senseError{key: keyIllegalRequest, code: codeInvalidParameter, field: uint16(at), bit: -1, hasField: true}
}

func withInfo(key uint8, c code, info uint64) *senseError {
	return &senseError{key: key, code: c, info: info, hasInfo: true}
}

// encode returns the sense data in fixed or descriptor format (SPC-4, 4.5).
func (e *senseError) encode(descriptor bool) []byte {
	if descriptor {
		return e.descriptors()
	}
	b := make([]byte, 18)
	b[0] = 0x70
	b[2] = e.key
	b[7] = byte(len(b) - 8)
	binary.BigEndian.PutUint16(b[12:], uint16(e.code))
	if e.hasInfo && e.info <= 0xFFFFFFFF {
		b[0] |= 0x80 // VALID
		binary.BigEndian.PutUint32(b[3:], uint32(e.info))
	}
	if e.hasField {
		copy(b[15:], e.keySpecific())
	}
	return b
}

func (e *senseError) descriptors() []byte {
	b := []byte{0x72, e.key, byte(e.code >> 8), byte(e.code), 0, 0, 0, 0}
	if e.hasInfo {
		b = append(b, 0x00, 0x0A, 0x80, 0)
		b = binary.BigEndian.AppendUint64(b, e.info)
	}
	if e.hasField {
		b = append(b, 0x02, 0x06, 0, 0)
		b = append(append(b, e.keySpecific()...), 0)
	}
	b[7] = byte(len(b) - 8)
	return b
}

// keySpecific returns the three bytes of a field pointer.
func (e *senseError) keySpecific() []byte {
	b := []byte{0x80, byte(e.field >> 8), byte(e.field)} // SKSV
	if e.inCommand {
		b[0] |= 0x40
	}
	if e.bit >= 0 {
		b[0] |= 0x08 | byte(e.bit)&7
	}
	return b
}

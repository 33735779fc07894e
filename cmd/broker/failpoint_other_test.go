//go:build !linux

package main

import "errors"

func watchDisk(func(flush bool)) error { return errors.ErrUnsupported }
